"""Resident forms of a packed weight: pictures, shapes, packing and its inverse."""
