"""How many clusters of blocks the GPU can hold at once, as the driver tells: it depends on how the chip's processors
are spread over its groups, which differs from chip to chip. Needs cuda-bindings, which recent torch brings along.
"""

from __future__ import annotations

import importlib
from typing import Any

# An empty kernel: with so much shared memory its own registers do not matter.
KERNEL = b".version 7.8\n.target sm_90\n.address_size 64\n.visible .entry nothing() { ret; }\n\0"
THREADS = 256  # of a block of the clustering's kernels
# Blocks of a cluster, and bytes of shared memory of each: the ICM's forward for 64 centres of 256 channels as it is,
# with smaller and larger teams, and with so little that two blocks fit one multiprocessor.
ASKED = ((8, 154_624), (4, 154_624), (2, 154_624), (16, 154_624), (8, 113 * 1024), (4, 113 * 1024))


def clusters() -> list[dict[str, int]]:
    """For the current CUDA context, which torch has to have made.

    Raises:
        ImportError: no cuda-bindings.
        RuntimeError: the driver refuses.
    """
    driver: Any = importlib.import_module("cuda.bindings.driver")
    module = _done(driver, driver.cuModuleLoadData(KERNEL))
    try:
        function = _done(driver, driver.cuModuleGetFunction(module, b"nothing"))
        return [_ask(driver, function, blocks, shared) for blocks, shared in ASKED]
    finally:
        driver.cuModuleUnload(module)


def _ask(driver: Any, function: Any, blocks: int, shared: int) -> dict[str, int]:
    attributes = driver.CUfunction_attribute
    allowed = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _done(driver, driver.cuFuncSetAttribute(function, allowed, shared))
    if blocks > 8:
        larger = attributes.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
        _done(driver, driver.cuFuncSetAttribute(function, larger, 1))
    count = _done(driver, driver.cuOccupancyMaxActiveClusters(function, launch(driver, blocks, shared)))
    return {"blocks": blocks, "shared_bytes": shared, "clusters_at_once": int(count)}


def launch(driver: Any, blocks: int, shared: int) -> Any:
    """A launch of clusters of so many blocks."""
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    dimension = attribute.value.clusterDim
    dimension.x, dimension.y, dimension.z = blocks, 1, 1
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = 64 * blocks, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = THREADS, 1, 1
    config.sharedMemBytes = shared
    config.attrs, config.numAttrs = [attribute], 1
    return config


def _done(driver: Any, answer: tuple[Any, ...]) -> Any:
    """What a call of the driver gives beside its status."""
    if answer[0] != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"the CUDA driver answers {answer[0].name}")
    return answer[1] if len(answer) > 1 else None
