// The two layouts of images that the kernels read and write without a copy.
#pragma once
#include "stable.h"

namespace frd {
using torch::headeronly::MemoryFormat;

// x [B, C, H, W]
inline bool is_channels_last(const Tensor& x) {
  int64_t expected = 1;
  for (int64_t dim : {1, 3, 2, 0}) {
    if (x.size(dim) != 1 && x.stride(dim) != expected) return false;
    expected *= x.size(dim);
  }
  return true;
}

// The layout of a result: channels_last where x [B, C, H, W] is dense in it and not contiguous too, else
// contiguous.
inline MemoryFormat layout_of(const Tensor& x) {
  if (x.is_contiguous() || !is_channels_last(x)) return MemoryFormat::Contiguous;
  return MemoryFormat::ChannelsLast;
}

// x (images [B, C, H, W] for channels_last), or a copy in the layout. Asks before it goes through the
// dispatcher, which takes a microsecond to find that there is nothing to do.
inline Tensor in_layout(const Tensor& x, MemoryFormat format = MemoryFormat::Contiguous) {
  const bool done = format == MemoryFormat::Contiguous ? x.is_contiguous() : is_channels_last(x);
  return done ? x : torch::stable::contiguous(x, format);
}

inline Tensor empty_images(const Tensor& like, int64_t channels, int64_t height, int64_t width,
                           MemoryFormat format) {
  return torch::stable::empty({like.size(0), channels, height, width}, like.scalar_type(), std::nullopt,
                              like.device(), std::nullopt, format);
}

}  // namespace frd
