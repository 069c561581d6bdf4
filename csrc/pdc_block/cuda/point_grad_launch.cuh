// Launch of the 1x1 weight's gradient, for inst.cu.
#pragma once
#include "pdc_block/cuda/block_launch.cuh"
#include "pdc_block/cuda/point_grad.cuh"

namespace frd {

template <class T, bool kPixels, class Tile>
cudaError_t launch_point_grad(const PointGradArgs& args, cudaStream_t stream) {
  using S = PointGradShape<T, kPixels, Tile>;
  PointGrad a{};
  static_cast<PointGradArgs&>(a) = args;
  const int64_t images = kPixels ? 1 : args.batch;
  a.plane = kPixels ? args.batch * args.pixels : args.pixels;
  a.image_grad = a.plane * a.out_channels;
  a.image_hidden = a.plane * a.channels;
  a.runs_of_image = Divider(blocks_of(a.plane, S::kRun));
  a.runs = static_cast<int>(images * a.runs_of_image.divisor);
  constexpr int64_t kSize = sizeof(T);
  a.wide_grad = aligned(a.grad, 16) && (kPixels ? a.out_channels : a.plane) * kSize % 16 == 0;
  a.wide_hidden = aligned(a.hidden, 16) && (kPixels ? a.channels : a.plane) * kSize % 16 == 0;
  a.wide_partial = a.channels % 8 == 0 && a.out_channels % 4 == 0 && aligned(a.partial, 16);
  const auto kernel = point_grad_kernel<T, kPixels, Tile>;
  if (const cudaError_t error =
          cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes))
    return error;
  const dim3 grid(a.parts, blocks_of(a.out_channels, Tile::kM), blocks_of(a.channels, Tile::kN));
  FRD_LAUNCH(kernel, grid, dim3(S::kThreads), S::kSharedBytes, stream, a);
  if (const cudaError_t error = cudaGetLastError()) return error;
  const int64_t sums = int64_t{args.out_channels} * (args.channels + 1);
  FRD_LAUNCH((point_grad_reduce_kernel<T>), dim3(blocks_of(sums, kReduceThreads)), dim3(kReduceThreads), 0,
             stream, args);
  return cudaGetLastError();
}

// Small tiles where large ones would leave a card idle: sums and parts are the same.
template <class T>
cudaError_t point_grad(const PointGradArgs& a, cudaStream_t stream) {
  const int64_t large_blocks = int64_t{a.parts} * blocks_of(a.out_channels, LargeGradTile::kM) *
                               blocks_of(a.channels, LargeGradTile::kN);
  const bool large = large_blocks >= 128;
  if (a.channels_last)
    return large ? launch_point_grad<T, true, LargeGradTile>(a, stream)
                 : launch_point_grad<T, true, SmallGradTile>(a, stream);
  return large ? launch_point_grad<T, false, LargeGradTile>(a, stream)
               : launch_point_grad<T, false, SmallGradTile>(a, stream);
}

}  // namespace frd
