// The two layouts of images that the CPU kernels read and write without a copy.
#pragma once
#include "stable.h"

namespace frd {
using torch::headeronly::MemoryFormat;

// The layout of a result: channels_last where x [B, C, H, W] is dense in it and not contiguous too, else
// contiguous.
inline MemoryFormat layout_of(const Tensor& x) {
  if (x.is_contiguous()) return MemoryFormat::Contiguous;
  int64_t expected = 1;
  for (int64_t dim : {1, 3, 2, 0}) {
    if (x.size(dim) != 1 && x.stride(dim) != expected) return MemoryFormat::Contiguous;
    expected *= x.size(dim);
  }
  return MemoryFormat::ChannelsLast;
}

inline Tensor empty_images(const Tensor& like, int64_t channels, int64_t height, int64_t width,
                           MemoryFormat format) {
  return torch::stable::empty({like.size(0), channels, height, width}, like.scalar_type(), std::nullopt,
                              like.device(), std::nullopt, format);
}

}  // namespace frd
