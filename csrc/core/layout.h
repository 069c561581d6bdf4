// The two memory layouts of images [B, C, H, W] that the kernels take without a copy.
#pragma once
#include "stable.h"

namespace frd {
using torch::headeronly::MemoryFormat;

// Whether x [B, C, H, W] is dense in channels_last.
inline bool is_channels_last(const Tensor& x) {
  int64_t expected = 1;
  for (int64_t dim : {1, 3, 2, 0}) {
    if (x.size(dim) != 1 && x.stride(dim) != expected) return false;
    expected *= x.size(dim);
  }
  return true;
}

// The layout of a result: channels_last if x [B, C, H, W] is dense in it and not contiguous as well, else
// contiguous.
inline MemoryFormat layout_of(const Tensor& x) {
  if (x.is_contiguous() || !is_channels_last(x)) return MemoryFormat::Contiguous;
  return MemoryFormat::ChannelsLast;
}

// x (for channels_last [B, C, H, W]) in the layout, copied only if needed. Checks that here, as
// torch::stable::contiguous costs a microsecond in the dispatcher even if there is nothing to do.
inline Tensor in_layout(const Tensor& x, MemoryFormat format = MemoryFormat::Contiguous) {
  const bool matches = format == MemoryFormat::Contiguous ? x.is_contiguous() : is_channels_last(x);
  return matches ? x : torch::stable::contiguous(x, format);
}

// x in the dtype; likewise, as torch::stable::to takes that microsecond.
inline Tensor in_type(const Tensor& x, ScalarType dtype) {
  return x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
}

// Uninitialised [B, channels, height, width] with the batch, dtype and device of `like`.
inline Tensor empty_images(const Tensor& like, int64_t channels, int64_t height, int64_t width,
                           MemoryFormat format) {
  return torch::stable::empty({like.size(0), channels, height, width}, like.scalar_type(), std::nullopt,
                              like.device(), std::nullopt, format);
}

}  // namespace frd
