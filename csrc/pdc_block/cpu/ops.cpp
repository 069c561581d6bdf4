#include <array>
#include <atomic>
#include <cstdlib>
#include <tuple>

#include "core/gemm.h"
#include "core/layout.h"
#include "pdc/taps.h"
#include "pdc_block/cpu/kernel.h"
#include "pdc_block/op.h"

namespace frd {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kForwardTile = 64;    // pixels: the tile and the 1x1 weight share the second cache
constexpr int64_t kBackwardTile = 128;  // more, as the weight's gradient passes through the cache once a tile
constexpr int64_t kTilesPerGroup = 2;   // of the backward pass; a group leaves one partial weight gradient
constexpr int64_t kMaxGroups = 16;

int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Tiles of about `target` pixels: whole rows, evenly shared out, or pieces of a row. Set by the shape alone.
int64_t cut(PdcBlockArgs& a, int64_t target) {
  if (a.out_width <= target) {
    a.tile_columns = a.out_width;
    a.tiles_y = ceil_div(a.out_height, target / a.out_width);
    a.tile_rows = ceil_div(a.out_height, a.tiles_y);
    a.tiles_y = ceil_div(a.out_height, a.tile_rows);
  } else {
    a.tile_rows = 1;
    a.tile_columns = ceil_div(ceil_div(a.out_width, ceil_div(a.out_width, target)), 16) * 16;
    a.tiles_y = a.out_height;
  }
  a.tiles_x = ceil_div(a.out_width, a.tile_columns);
  return a.batch * a.tiles_y * a.tiles_x;
}

// The weights as the kernel wants them; `a` points into the tensors, which have to outlive it.
struct Prepared {
  Tensor pdc_weight, point_weight, work;
};

// point_bias [Co] or null
Prepared prepare(PdcBlockArgs& a, const Tensor& pdc_weight, const OptionalTensor& pdc_bias,
                 const Tensor& point_weight, const OptionalTensor& point_bias, bool backward) {
  const OptionalTensor shift = pdc_bias ? OptionalTensor(in_layout(*pdc_bias)) : std::nullopt;
  const OptionalTensor bias = point_bias ? OptionalTensor(in_layout(*point_bias)) : std::nullopt;
  Prepared p{in_layout(pdc_weight), in_layout(point_weight), Tensor()};
  const int64_t c = a.channels;
  const int64_t co = a.out_channels;
  const int64_t k = backward ? co : c;
  const int64_t n = backward ? c : co;
  const GemmKernels& gemm = gemm_kernels();
  with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    using A = compute_t<T>;
    constexpr bool same = sizeof(T) == sizeof(A);
    const auto whole_lines = [](int64_t elements) { return ceil_div(elements, 16) * 16; };
    const int64_t stencil_size = whole_lines(c * kStencilRow);
    const int64_t bias_size = bias ? whole_lines(co) : 0;
    int64_t point_size = same ? 0 : co * c;
    if (a.channels_last)
      point_size = sizeof(A) == 8 ? gemm.f64.packed_size(k, n) : gemm.f32.packed_size(k, n);
    p.work = torch::stable::new_empty(p.point_weight, {stencil_size + bias_size + point_size},
                                      sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float);
    A* stencil = static_cast<A*>(p.work.mutable_data_ptr());
    const T* weights = static_cast<const T*>(p.pdc_weight.const_data_ptr());
    const T* shifts = shift ? static_cast<const T*>(shift->const_data_ptr()) : nullptr;
    const int64_t of_channel = a.channels_last ? 1 : kStencilRow;
    const int64_t of_weight = a.channels_last ? c : 1;
    for (int64_t i = 0; i < c; ++i) {
      A* to = stencil + i * of_channel;
      for (int j = 0; j < kPdcWeights; ++j) to[j * of_weight] = load(weights[i * kPdcWeights + j]);
      to[kPdcWeights * of_weight] = shifts ? load(shifts[i]) : A(0);
    }
    a.stencil = stencil;
    if (bias) {
      A* to = stencil + stencil_size;
      for (int64_t i = 0; i < co; ++i) to[i] = load(static_cast<const T*>(bias->const_data_ptr())[i]);
      a.point_bias = to;
    }
    const T* point = static_cast<const T*>(p.point_weight.const_data_ptr());
    A* to = stencil + stencil_size + bias_size;
    a.point = to;
    const int64_t rs = backward ? c : 1;
    const int64_t cs = backward ? 1 : c;
    if (!a.channels_last) {
      if constexpr (same) {
        a.point = point;
      } else {
        for (int64_t i = 0; i < co * c; ++i) to[i] = load(point[i]);
      }
    } else if constexpr (std::is_same_v<T, float>) {
      gemm.f32.pack(point, rs, cs, k, n, to);
    } else if constexpr (std::is_same_v<T, double>) {
      gemm.f64.pack(point, rs, cs, k, n, to);
    } else if constexpr (std::is_same_v<T, bf16>) {
      gemm.f32_pack_bf16(point, rs, cs, k, n, to);
    } else {
      gemm.f32_pack_f16(point, rs, cs, k, n, to);
    }
  });
  return p;
}

int64_t compute_size(const PdcBlockArgs& a) { return a.dtype == DType::f64 ? 8 : 4; }

// A buffer of this thread that stays for its next calls: fresh pages would cost as much as a small tile.
// Null when there is no memory.
void* thread_scratch(int64_t bytes) {
  struct Buffer {
    void* data = nullptr;
    int64_t size = 0;
    ~Buffer() { std::free(data); }
  };
  thread_local Buffer buffer;
  if (buffer.size < bytes) {
    std::free(buffer.data);
    buffer.data = std::aligned_alloc(64, ceil_div(bytes, 64) * 64);
    buffer.size = buffer.data ? bytes : 0;
  }
  return buffer.data;
}

// work(scratch, begin, end) over `items`, shared out among the threads
template <class Work>
void run(int64_t items, int64_t scratch_bytes, const Work& work) {
  std::atomic<bool> failed{false};
  torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    void* scratch = thread_scratch(scratch_bytes);
    if (scratch)
      work(scratch, begin, end);
    else
      failed = true;
  });
  STD_TORCH_CHECK(!failed, "pdc_block: no memory for a scratch of ", scratch_bytes, " bytes");
}

// residual [B, Co, Ho, Wo] -> [B, Co, Ho, Wo]
Tensor pdc_block(const Tensor& x_, const Tensor& pdc_weight, const OptionalTensor& pdc_bias,
                 const Tensor& point_weight, const OptionalTensor& point_bias,
                 const OptionalTensor& residual_, int64_t kind, double theta, const Ints& stride,
                 const Ints& dilation) {
  PdcBlockArgs a{checked_pdc_block(x_, pdc_weight, pdc_bias, point_weight, kind, theta, stride, dilation)};
  check_point_bias(a, point_bias, x_);
  const Tensor x = in_layout(x_, format_of(a));
  const OptionalTensor residual =
      residual_ ? OptionalTensor(matching(a, "residual", *residual_, x, a.out_channels)) : std::nullopt;
  Tensor out = empty_images(x, a.out_channels, a.out_height, a.out_width, format_of(a));
  if (a.batch == 0) return out;
  const Prepared prepared = prepare(a, pdc_weight, pdc_bias, point_weight, point_bias, false);
  const int64_t tiles = cut(a, kForwardTile);
  a.x = x.const_data_ptr();
  a.residual = residual ? residual->const_data_ptr() : nullptr;
  a.out = out.mutable_data_ptr();
  const PdcBlockKernels& kernels = pdc_block_kernels();
  run(tiles, kernels.forward_scratch(a) * compute_size(a),
      [&](void* scratch, int64_t begin, int64_t end) { kernels.forward(a, scratch, begin, end); });
  return out;
}

// sums [groups, Co * C + Co] -> d_point [Co, C, 1, 1], d_bias [Co]: group after group
void reduce(const PdcBlockArgs& a, const Tensor& sums, int64_t groups, Tensor& d_point, Tensor& d_bias) {
  const int64_t weights = a.out_channels * a.channels;
  const int64_t row = weights + a.out_channels;
  with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    using A = compute_t<T>;
    const A* from = static_cast<const A*>(sums.const_data_ptr());
    T* to_point = static_cast<T*>(d_point.mutable_data_ptr());
    T* to_bias = static_cast<T*>(d_bias.mutable_data_ptr());
    torch::stable::parallel_for(0, row, 16384, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        A sum = from[i];
        for (int64_t g = 1; g < groups; ++g) sum += from[g * row + i];
        store(i < weights ? to_point[i] : to_bias[i - weights], sum);
      }
    });
  });
}

// The gradients of the difference convolution: its own operator, with padding = dilation.
std::tuple<Tensor, Tensor, Tensor> pdc2d_depthwise_backward(const Tensor& grad, const Tensor& x,
                                                            const Tensor& weight, int64_t kind, double theta,
                                                            const Ints& stride, const Ints& padding,
                                                            const Ints& dilation, bool need_dx,
                                                            bool need_dw) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 10> stack{from(grad),    from(x),      from(weight),  from(kind),
                                     from(theta),   from(stride), from(padding), from(dilation),
                                     from(need_dx), from(need_dw)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("frd::pdc2d_depthwise_backward", "", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2])};
}

// grad [B, Co, Ho, Wo] -> dx [B, C, H, W], d_pdc [C, 1, 3, 3], d_pdc_bias [C], d_point [Co, C, 1, 1],
// d_point_bias [Co]
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pdc_block_backward(
    const Tensor& grad_, const Tensor& x_, const Tensor& pdc_weight, const OptionalTensor& pdc_bias,
    const Tensor& point_weight, int64_t kind, double theta, const Ints& stride, const Ints& dilation) {
  PdcBlockArgs a{checked_pdc_block(x_, pdc_weight, pdc_bias, point_weight, kind, theta, stride, dilation)};
  const Tensor x = in_layout(x_, format_of(a));
  const Tensor grad = matching(a, "grad", grad_, x, a.out_channels);
  Tensor d_point = torch::stable::new_empty(x, {a.out_channels, a.channels, 1, 1});
  Tensor d_point_bias = torch::stable::new_empty(x, {a.out_channels});
  // What leaves the 1x1 and the ReLU backwards: never larger than x, and read again while still in a cache.
  Tensor hidden_grad = empty_images(x, a.channels, a.out_height, a.out_width, format_of(a));
  if (a.batch == 0) {
    torch::stable::zero_(d_point);
    torch::stable::zero_(d_point_bias);
  } else {
    const Prepared prepared = prepare(a, pdc_weight, pdc_bias, point_weight, std::nullopt, true);
    const int64_t tiles = cut(a, kBackwardTile);
    const int64_t wanted = ceil_div(tiles, kTilesPerGroup);
    const int64_t groups = wanted < kMaxGroups ? wanted : kMaxGroups;
    const int64_t row = a.out_channels * a.channels + a.out_channels;
    Tensor sums = torch::stable::new_empty(prepared.work, {groups, row});
    char* partial = static_cast<char*>(sums.mutable_data_ptr());
    a.x = x.const_data_ptr();
    a.grad = grad.const_data_ptr();
    a.hidden_grad = hidden_grad.mutable_data_ptr();
    const PdcBlockKernels& kernels = pdc_block_kernels();
    run(groups, kernels.backward_scratch(a) * compute_size(a),
        [&](void* scratch, int64_t begin, int64_t end) {
          for (int64_t g = begin; g < end; ++g)
            kernels.backward(a, scratch, tiles * g / groups, tiles * (g + 1) / groups,
                             partial + g * row * compute_size(a));
        });
    reduce(a, sums, groups, d_point, d_point_bias);
  }
  auto [dx, d_pdc, d_pdc_bias] = pdc2d_depthwise_backward(hidden_grad, x, pdc_weight, kind, theta, stride,
                                                          dilation, dilation, true, true);
  return {dx, d_pdc, d_pdc_bias, d_point, d_point_bias};
}

}  // namespace
}  // namespace frd

STABLE_TORCH_LIBRARY_IMPL(frd, CPU, m) {
  m.impl("pdc_block", TORCH_BOX(&frd::pdc_block));
  m.impl("pdc_block_backward", TORCH_BOX(&frd::pdc_block_backward));
}
