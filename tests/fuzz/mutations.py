"""What a fuzz case does to a checkpoint: to tensors, to the config, to headers, to files.

Each mutation changes a `Draft` and records there which values may differ after a load and which
words an error has to hold one of. None knows a format: what it needs, the draft tells.
"""

import random
from collections.abc import Callable

from file_mutations import (
    change_config,
    change_files,
    change_header,
    change_index,
    damage_data_bytes,
    damage_header_bytes,
    flip_config_bytes,
    reformat_header,
    replace_config,
    resize_file,
    swap_header_entries,
)
from harness import Draft
from tensor_mutations import (
    add_tensor,
    cast_tensor,
    drop_tensor,
    flip_tensor_bit,
    poison_floats,
    poison_integers,
    rename_module,
    rename_tensor,
    reshape_tensor,
    swap_tensors,
)

Mutation = Callable[[Draft, random.Random], None]

MUTATIONS: tuple[Mutation, ...] = (
    *(drop_tensor, rename_tensor, rename_module, reshape_tensor, cast_tensor, poison_floats),
    *(poison_integers, flip_tensor_bit, swap_tensors, add_tensor),
    *(change_config, change_config, change_config, flip_config_bytes, replace_config),
    *(change_header, change_header, swap_header_entries, reformat_header, damage_header_bytes),
    *(damage_data_bytes, resize_file, change_index, change_files),
)


def mutate(draft: Draft, rng: random.Random) -> None:
    """One mutation, now and then two; what they did is in `draft.log`."""
    for _ in range(rng.choice((1, 1, 1, 1, 2))):
        mutation = rng.choice(MUTATIONS)
        if draft.after or (draft.files and mutation is not change_files):
            continue  # what the others change is written, or damaged, already
        mutation(draft, rng)
        draft.log.append(mutation.__name__)
