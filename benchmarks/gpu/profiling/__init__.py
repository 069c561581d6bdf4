"""Why a kernel is slow on a GPU."""
