// Argument checks and allocation of the clustering, shared by the CPU and CUDA operators.
#pragma once
#include <array>
#include <optional>
#include <type_traits>

#include "cluster/common.h"
#include "core/layout.h"
#include "core/stable.h"

namespace frd {

using Sizes = std::vector<int64_t>;

template <class A>
constexpr ScalarType kScalarType = std::is_same<A, double>::value ? ScalarType::Double : ScalarType::Float;

inline ScalarType compute_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// t [B, N, C]
inline TokenView view_of(const Tensor& t) {
  return {const_cast<void*>(t.const_data_ptr()), dtype_of(t, "a tensor"), t.stride(0), t.stride(1),
          t.stride(2)};
}

// Whether tokens [B, N, C] are a permuted image [B, C, H * W].
inline bool is_channel_major(const Tensor& t) {
  return t.size(1) > 1 && t.stride(1) == 1 && t.stride(2) >= t.size(1);
}

// Uninitialised [B, N, C]; if channel_major its memory is [B, C, N]. Not a transposed contiguous tensor, as
// autograd forbids writing in place to a view that an operator returned.
inline Tensor new_tokens(const Tensor& like, int64_t batch, int64_t tokens, int64_t channels,
                         bool channel_major) {
  using torch::stable::detail::from;
  const Sizes size{batch, tokens, channels};
  if (!channel_major) return torch::stable::new_empty(like, size);
  const Sizes stride{channels * tokens, 1, tokens};
  std::array<StableIValue, 7> stack{from(like),
                                    from(torch::headeronly::IntHeaderOnlyArrayRef(size)),
                                    from(torch::headeronly::IntHeaderOnlyArrayRef(stride)),
                                    from(std::nullopt),
                                    from(std::nullopt),
                                    from(std::nullopt),
                                    from(std::nullopt)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::new_empty_strided", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Uninitialised, with the shape, dtype and layout of t [B, N, C].
inline Tensor new_like_tokens(const Tensor& t) {
  return new_tokens(t, t.size(0), t.size(1), t.size(2), is_channel_major(t));
}

// hw (H, W) of the tokens, grid (rows, columns)
inline void check_grid(const Sizes& hw, const Sizes& grid, int64_t tokens) {
  FRD_CHECK_VALUE(hw.size() == 2 && hw[0] > 0 && hw[1] > 0 && hw[0] * hw[1] == tokens,
                  "frd: hw must be (H, W) with H * W = ", tokens, " tokens");
  FRD_CHECK_VALUE(grid.size() == 2 && grid[0] > 0 && grid[1] > 0,
                  "frd: a grid must be (rows, columns) of at least 1");
}

// t [B, N, C]
inline void check_tokens(const Tensor& t, const char* name) {
  FRD_CHECK_VALUE(t.dim() == 3, "frd: ", name, " must be [B, N, C], got ", t.dim(), "-D");
  FRD_CHECK_VALUE(t.size(1) > 0 && t.size(2) > 0, "frd: ", name,
                  " must have at least one token and one channel");
  dtype_of(t, name);
}

inline void check_like(const Tensor& t, const Tensor& reference, const char* name) {
  bool same = t.dim() == reference.dim() && t.scalar_type() == reference.scalar_type();
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == reference.size(i);
  FRD_CHECK_VALUE(same, "frd: ", name, " must have the shape and dtype of its input");
}

// gate [count]: alpha or beta, in the compute type
inline Tensor check_gate(const Tensor& gate, const Tensor& tokens, int64_t count, const char* name) {
  FRD_CHECK_VALUE(gate.dim() == 1 && gate.size(0) == count && gate.scalar_type() == compute_type(tokens),
                  "frd: ", name, " must be [", count,
                  "] in the compute dtype (float64 for float64, else float32)");
  return in_layout(gate);
}

// k, v [B, N, C]; alpha, beta [1]; grid (rows, columns); hw (H, W)
inline void check_cluster(const Tensor& k, const Tensor& v, const Sizes& grid, const Sizes& hw,
                          int64_t aggregate) {
  check_tokens(k, "k");
  check_like(v, k, "v");
  check_grid(hw, grid, k.size(1));
  FRD_CHECK_VALUE(aggregate == 0 || aggregate == 1,
                  "frd: aggregate must be 0 (count) or 1 (similarity), got ", aggregate);
}

// mask: bool [B, N]
inline void check_mask(const Tensor& mask, int64_t batch, int64_t tokens) {
  FRD_CHECK_VALUE(mask.dim() == 2 && mask.size(0) == batch && mask.size(1) == tokens &&
                      mask.scalar_type() == ScalarType::Bool,
                  "frd: mask must be bool [", batch, ", ", tokens, "]");
}

// centres [B, O, C]; labels int32 [B, N]; similarity [B, N]
inline void check_dispatch(const Tensor& centres, const Tensor& labels, const Tensor& similarity) {
  FRD_CHECK_VALUE(centres.dim() == 3 && centres.size(1) > 0 && centres.size(2) > 0,
                  "frd: centres must be [B, O, C] with at least one centre and one channel");
  dtype_of(centres, "centres");
  FRD_CHECK_VALUE(labels.dim() == 2 && labels.size(0) == centres.size(0) && labels.size(1) > 0 &&
                      labels.scalar_type() == ScalarType::Int,
                  "frd: labels must be int32 [B, N] with the batch of centres");
  FRD_CHECK_VALUE(similarity.dim() == 2 && similarity.size(0) == labels.size(0) &&
                      similarity.size(1) == labels.size(1) &&
                      similarity.scalar_type() == compute_type(centres),
                  "frd: similarity must have the shape of labels in the compute dtype (float64 for float64, "
                  "else float32)");
}

// Values of the argument `variant`.
constexpr int64_t kPaper = 0;
constexpr int64_t kReleased = 1;

// The arguments of `icm` with T rounds.
struct IcmInputs {
  Tensor x;  // [B, N, C]
  // Per round Wk [C, C], bk [C], Wv [C, C], bv [C]; all [0] for a round without projections.
  std::vector<Tensor> projections;
  Tensor alpha, beta;  // [1], released [T]
  Sizes grids, hw;     // T times (rows, columns); (H, W)
  int64_t variant;

  int64_t count() const { return static_cast<int64_t>(grids.size()) / 2; }
  bool projected(int64_t t) const { return projections[4 * t].numel() > 0; }
};

inline void check_icm(const IcmInputs& in) {
  check_tokens(in.x, "x");
  FRD_CHECK_VALUE(in.variant == kPaper || in.variant == kReleased,
                  "frd: variant must be 0 (paper) or 1 (released), got ", in.variant);
  FRD_CHECK_VALUE(!in.grids.empty() && in.grids.size() % 2 == 0,
                  "frd: grids must hold pairs (rows, columns)");
  check_grid(in.hw, {in.grids[0], in.grids[1]}, in.x.size(1));
  for (size_t t = 2; t < in.grids.size(); t += 2)
    check_grid({in.grids[t - 2], in.grids[t - 1]}, {in.grids[t], in.grids[t + 1]},
               in.grids[t - 2] * in.grids[t - 1]);
  FRD_CHECK_VALUE(in.projections.size() == 2 * in.grids.size(),
                  "frd: projections must be 4 tensors for each of the ", in.count(), " grids, got ",
                  in.projections.size());
  const int64_t channels = in.x.size(2);
  for (size_t i = 0; i < in.projections.size(); ++i) {
    const Tensor& p = in.projections[i];
    const bool none = !in.projected(static_cast<int64_t>(i) / 4);
    const bool weight = i % 2 == 0;
    FRD_CHECK_VALUE(p.scalar_type() == in.x.scalar_type(), "frd: projections[", i, "] must have x's dtype");
    FRD_CHECK_VALUE(
        none ? p.numel() == 0
             : p.dim() == (weight ? 2 : 1) && p.size(0) == channels && (!weight || p.size(1) == channels),
        "frd: projections[", i, "] must be ", weight ? "[C, C]" : "[C]", " with C = ", channels);
  }
}

}  // namespace frd
