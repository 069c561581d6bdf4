// What the launchers ask of the CUDA runtime, answered as by a card with room for everything.
#include <cuda_runtime.h>

extern "C" {
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
}
