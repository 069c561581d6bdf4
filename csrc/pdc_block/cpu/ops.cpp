// CPU operators of the fused block: checks, memory, threads and registration.
#include <array>
#include <atomic>
#include <cstdlib>
#include <tuple>
#include <type_traits>

#include "core/gemm.h"
#include "core/layout.h"
#include "pdc/taps.h"
#include "pdc_block/cpu/kernel.h"
#include "pdc_block/op.h"

namespace frd {
namespace {

using OptionalTensor = std::optional<Tensor>;

// Pixels of a tile. A forward tile and the 1x1 weight share the second-level cache; the backward has larger
// tiles, as the weight's gradient passes through the cache once per tile.
constexpr int64_t kForwardTile = 64;
constexpr int64_t kBackwardTile = 128;
// Groups of tiles in the backward, each of which leaves one partial gradient of the 1x1 weight.
constexpr int64_t kTilesPerGroup = 2;
constexpr int64_t kMaxGroups = 16;

int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Cuts the output into tiles of about `target` pixels, whole rows or parts of a row, and returns their
// number. Depends on the shape alone, and so does the order of sums.
int64_t choose_tiles(PdcBlockArgs& a, int64_t target) {
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

// weights [C, 9], biases [C] or null -> NCHW [C, 10], channels_last [10, C]
template <class T>
void prepare_stencil(const PdcBlockArgs& a, const T* weights, const T* biases, compute_t<T>* out) {
  const int64_t channel_stride = a.channels_last ? 1 : kStencilRow;
  const int64_t weight_stride = a.channels_last ? a.channels : 1;
  for (int64_t c = 0; c < a.channels; ++c) {
    compute_t<T>* to = out + c * channel_stride;
    for (int k = 0; k < kPdcWeights; ++k) to[k * weight_stride] = load(weights[c * kPdcWeights + k]);
    to[kPdcWeights * weight_stride] = biases ? load(biases[c]) : compute_t<T>(0);
  }
}

// Packs point [Co, C] for the GEMM: for the forward its transpose, for the backward as it is.
template <class T>
void pack_point(const PdcBlockArgs& a, const T* point, bool backward, compute_t<T>* out) {
  const GemmKernels& gemm = gemm_kernels();
  const int64_t k = backward ? a.out_channels : a.channels;
  const int64_t n = backward ? a.channels : a.out_channels;
  const int64_t rs = backward ? a.channels : 1;
  const int64_t cs = backward ? 1 : a.channels;
  if constexpr (std::is_same_v<T, float>) {
    gemm.f32.pack(point, rs, cs, k, n, out);
  } else if constexpr (std::is_same_v<T, double>) {
    gemm.f64.pack(point, rs, cs, k, n, out);
  } else if constexpr (std::is_same_v<T, bf16>) {
    gemm.f32_pack_bf16(point, rs, cs, k, n, out);
  } else {
    gemm.f32_pack_f16(point, rs, cs, k, n, out);
  }
}

// Elements of the 1x1 weight as the kernel takes it; 0 if it takes point_weight [Co, C] as it is.
template <class T>
int64_t prepared_point_size(const PdcBlockArgs& a, bool backward) {
  using A = compute_t<T>;
  if (!a.channels_last) return sizeof(T) == sizeof(A) ? 0 : a.out_channels * a.channels;
  const int64_t k = backward ? a.out_channels : a.channels;
  const int64_t n = backward ? a.channels : a.out_channels;
  return sizeof(A) == 8 ? gemm_kernels().f64.packed_size(k, n) : gemm_kernels().f32.packed_size(k, n);
}

// Tensors that the prepared arguments point into.
struct Prepared {
  Tensor point_weight, work;
};

// Sets stencil, point and point_bias of the arguments. pdc_weight [C, 1, 3, 3], pdc_bias [C], point_weight
// [Co, C, 1, 1], point_bias [Co]; the result must outlive the arguments.
Prepared prepare_weights(PdcBlockArgs& a, const Tensor& pdc_weight_, const OptionalTensor& pdc_bias_,
                         const Tensor& point_weight, const OptionalTensor& point_bias_, bool backward) {
  const Tensor pdc_weight = in_layout(pdc_weight_);
  const OptionalTensor pdc_bias = pdc_bias_ ? OptionalTensor(in_layout(*pdc_bias_)) : std::nullopt;
  const OptionalTensor point_bias = point_bias_ ? OptionalTensor(in_layout(*point_bias_)) : std::nullopt;
  Prepared p{in_layout(point_weight), Tensor()};
  with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    using A = compute_t<T>;
    const auto whole_lines = [](int64_t elements) { return ceil_div(elements, 16) * 16; };
    const int64_t stencil_size = whole_lines(a.channels * kStencilRow);
    const int64_t bias_size = point_bias ? whole_lines(a.out_channels) : 0;
    const int64_t point_size = prepared_point_size<T>(a, backward);
    p.work = torch::stable::new_empty(p.point_weight, {stencil_size + bias_size + point_size},
                                      sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float);
    A* stencil = static_cast<A*>(p.work.mutable_data_ptr());
    const T* biases = pdc_bias ? static_cast<const T*>(pdc_bias->const_data_ptr()) : nullptr;
    prepare_stencil(a, static_cast<const T*>(pdc_weight.const_data_ptr()), biases, stencil);
    a.stencil = stencil;
    if (point_bias) {
      A* bias = stencil + stencil_size;
      const T* from = static_cast<const T*>(point_bias->const_data_ptr());
      for (int64_t i = 0; i < a.out_channels; ++i) bias[i] = load(from[i]);
      a.point_bias = bias;
    }
    const T* point = static_cast<const T*>(p.point_weight.const_data_ptr());
    A* prepared = stencil + stencil_size + bias_size;
    a.point = point_size > 0 ? static_cast<const void*>(prepared) : point;
    if (a.channels_last) {
      pack_point(a, point, backward, prepared);
    } else if (point_size > 0) {
      for (int64_t i = 0; i < point_size; ++i) prepared[i] = load(point[i]);
    }
  });
  return p;
}

int64_t compute_size(const PdcBlockArgs& a) { return a.dtype == DType::f64 ? 8 : 4; }

// A buffer that this thread keeps for its next calls, as mapping fresh pages would cost as much as a small
// tile. Null if the allocation failed.
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

// Runs work(scratch, begin, end) over the tasks 0 .. tasks - 1, distributed over threads.
template <class Work>
void run_tasks(int64_t tasks, int64_t scratch_bytes, const Work& work) {
  std::atomic<bool> failed{false};
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    void* scratch = thread_scratch(scratch_bytes);
    if (scratch)
      work(scratch, begin, end);
    else
      failed = true;
  });
  STD_TORCH_CHECK(!failed, "pdc_block: no memory for a scratch of ", scratch_bytes, " bytes");
}

// x [B, C, H, W], pdc_weight [C, 1, 3, 3], pdc_bias [C], point_weight [Co, C, 1, 1], point_bias [Co],
// residual [B, Co, Ho, Wo] -> [B, Co, Ho, Wo]
Tensor pdc_block(const Tensor& x_, const Tensor& pdc_weight, const OptionalTensor& pdc_bias,
                 const Tensor& point_weight, const OptionalTensor& point_bias,
                 const OptionalTensor& residual_, int64_t kind, double theta, const Ints& stride,
                 const Ints& dilation) {
  PdcBlockArgs a{};
  static_cast<PdcBlockGeometry&>(a) =
      checked_pdc_block(x_, pdc_weight, pdc_bias, point_weight, kind, theta, stride, dilation);
  check_point_bias(a, point_bias, x_);
  const Tensor x = in_layout(x_, format_of(a));
  const OptionalTensor residual =
      residual_ ? OptionalTensor(checked_images(a, "residual", *residual_, x, a.out_channels)) : std::nullopt;
  Tensor out = empty_images(x, a.out_channels, a.out_height, a.out_width, format_of(a));
  if (a.batch == 0) return out;
  const Prepared prepared = prepare_weights(a, pdc_weight, pdc_bias, point_weight, point_bias, false);
  const int64_t tiles = choose_tiles(a, kForwardTile);
  a.x = x.const_data_ptr();
  a.residual = residual ? residual->const_data_ptr() : nullptr;
  a.out = out.mutable_data_ptr();
  const PdcBlockKernels& kernels = pdc_block_kernels();
  run_tasks(tiles, kernels.forward_scratch(a) * compute_size(a),
            [&](void* scratch, int64_t begin, int64_t end) { kernels.forward(a, scratch, begin, end); });
  return out;
}

// sums [groups, Co * C + Co] -> d_point [Co, C, 1, 1], d_bias [Co], added in ascending order.
void reduce_point_grad(const PdcBlockArgs& a, const Tensor& sums, int64_t groups, Tensor& d_point,
                       Tensor& d_bias) {
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

// Calls the operator for the gradients of the difference convolution. grad [B, C, Ho, Wo], x [B, C, H, W],
// weight [C, 1, 3, 3] -> dx, dw, db
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

// grad [B, Co, Ho, Wo], x [B, C, H, W], pdc_weight [C, 1, 3, 3], pdc_bias [C], point_weight [Co, C, 1, 1] ->
// dx [B, C, H, W], d_pdc [C, 1, 3, 3], d_pdc_bias [C], d_point [Co, C, 1, 1], d_point_bias [Co] or, if not
// needed, [0]
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pdc_block_backward(
    const Tensor& grad_, const Tensor& x_, const Tensor& pdc_weight, const OptionalTensor& pdc_bias,
    const Tensor& point_weight, int64_t kind, double theta, const Ints& stride, const Ints& dilation,
    bool need_point_bias) {
  PdcBlockArgs a{};
  static_cast<PdcBlockGeometry&>(a) =
      checked_pdc_block(x_, pdc_weight, pdc_bias, point_weight, kind, theta, stride, dilation);
  const Tensor x = in_layout(x_, format_of(a));
  const Tensor grad = checked_images(a, "grad", grad_, x, a.out_channels);
  Tensor d_point = torch::stable::new_empty(x, {a.out_channels, a.channels, 1, 1});
  Tensor d_point_bias = torch::stable::new_empty(x, {a.out_channels});
  // The gradient of the stencil's output. No larger than x, and read again while still in a cache.
  Tensor hidden_grad = empty_images(x, a.channels, a.out_height, a.out_width, format_of(a));
  if (a.batch == 0) {
    torch::stable::zero_(d_point);
    torch::stable::zero_(d_point_bias);
  } else {
    const Prepared prepared = prepare_weights(a, pdc_weight, pdc_bias, point_weight, std::nullopt, true);
    const int64_t tiles = choose_tiles(a, kBackwardTile);
    const int64_t wanted = ceil_div(tiles, kTilesPerGroup);
    const int64_t groups = wanted < kMaxGroups ? wanted : kMaxGroups;
    const int64_t row = a.out_channels * a.channels + a.out_channels;
    Tensor sums = torch::stable::new_empty(prepared.work, {groups, row});
    char* partial = static_cast<char*>(sums.mutable_data_ptr());
    a.x = x.const_data_ptr();
    a.grad = grad.const_data_ptr();
    a.hidden_grad = hidden_grad.mutable_data_ptr();
    const PdcBlockKernels& kernels = pdc_block_kernels();
    run_tasks(groups, kernels.backward_scratch(a) * compute_size(a),
              [&](void* scratch, int64_t begin, int64_t end) {
                for (int64_t g = begin; g < end; ++g)
                  kernels.backward(a, scratch, tiles * g / groups, tiles * (g + 1) / groups,
                                   partial + g * row * compute_size(a));
              });
    reduce_point_grad(a, sums, groups, d_point, d_point_bias);
  }
  auto [dx, d_pdc, d_pdc_bias] = pdc2d_depthwise_backward(hidden_grad, x, pdc_weight, kind, theta, stride,
                                                          dilation, dilation, true, true);
  if (!need_point_bias) d_point_bias = torch::stable::new_empty(x, {0});
  return {dx, d_pdc, d_pdc_bias, d_point, d_point_bias};
}

}  // namespace
}  // namespace frd

STABLE_TORCH_LIBRARY_IMPL(frd, CPU, m) {
  m.impl("pdc_block", TORCH_BOX(&frd::pdc_block));
  m.impl("pdc_block_backward", TORCH_BOX(&frd::pdc_block_backward));
}
