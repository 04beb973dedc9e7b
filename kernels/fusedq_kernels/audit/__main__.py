import sys

from fusedq_kernels.audit.command import main

if __name__ == "__main__":
    sys.exit(main())
