// The clustering's CUDA kernel on the CPU against plain loops in double.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "cluster/cuda/icm_launch.cuh"

using namespace frd;

extern "C" cudaError_t cudaGetLastError() { return cudaSuccess; }
extern "C" cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

namespace {

using Matrix = std::vector<std::vector<double>>;

std::mt19937 generator(1);

template <class T>
std::vector<T> numbers(int64_t count, double scale) {
  std::normal_distribution<float> normal(0, static_cast<float>(scale));
  std::vector<T> v(count);
  for (T& e : v) frd::store(e, normal(generator));
  return v;
}

struct Grid {
  int rows, columns;
};
struct Case {
  int channels;
  std::vector<Grid> grids;  // of the tokens, of the rounds
  bool dense, projected;
  int team, shared_limit;
  bool channel_major = false;
};

template <class T>
struct Problem {
  static constexpr int kBatch = 2;
  Case c;
  IcmArgs a{};
  std::vector<T> x, out;
  std::vector<std::vector<T>> maps;
  std::vector<int32_t> labels;
  std::vector<float> saved, workspace, alpha{1.5f, -0.75f, 2.f}, beta{0.25f, -0.125f, 0.5f};

  explicit Problem(const Case& which) : c(which) {
    const int tokens = c.grids[0].rows * c.grids[0].columns;
    a.dtype = sizeof(T) == 4 ? DType::f32 : DType::bf16;
    a.batch = kBatch, a.channels = c.channels, a.shared = a.dispatch = true;
    a.dense = c.dense, a.weighted = a.ordered = !c.dense;
    a.columns = c.grids.back().rows * c.grids.back().columns;
    for (size_t t = 0; t + 1 < c.grids.size(); ++t) add_round(c.grids[t], c.grids[t + 1]);
    x = numbers<T>(int64_t{kBatch} * tokens * c.channels, 1);
    out.resize(x.size());
    a.keys = a.values = view(x, tokens), a.out = view(out, tokens);
    a.alpha = alpha.data(), a.beta = beta.data();
    labels.resize(kBatch * a.label_stride), saved.assign(kBatch * a.saved_stride, NAN);
    a.plan = plan_icm(a, c.team, c.shared_limit);
    a.workspace_stride = a.plan.workspace;
    workspace.assign(kBatch * a.plan.team * a.workspace_stride, NAN);
    a.labels = labels.data(), a.saved = saved.data(), a.workspace = workspace.data();
  }

  void add_round(Grid image, Grid grid) {
    RoundArgs& r = a.round[a.count++];
    r.height = image.rows, r.width = image.columns, r.rows = grid.rows, r.columns = grid.columns;
    r.labels = a.label_stride, a.label_stride += r.tokens();
    r.saved = saved_round(a.saved_stride, r.tokens(), r.centres(), a.channels, a.dense ? a.columns : 0,
                          a.count == 1);
    a.saved_stride = r.saved.end;
    if (!c.projected) return;
    const double scale = 1 / std::sqrt(c.channels);
    for (int i = 0; i < 4; ++i)
      maps.push_back(numbers<T>(i % 2 ? c.channels : c.channels * c.channels, i % 2 ? 0.25 : scale));
    const auto map = [&](int i) { return maps[maps.size() - 4 + i].data(); };
    r.key_weight = map(0), r.key_bias = map(1), r.value_weight = map(2), r.value_bias = map(3);
  }

  TokenView view(std::vector<T>& v, int64_t tokens) const {
    if (c.channel_major) return {v.data(), a.dtype, tokens * c.channels, 1, tokens};
    return {v.data(), a.dtype, tokens * c.channels, c.channels, 1};
  }
  double at(const std::vector<T>& v, int b, int n, int channel) const {
    return load(v[b * a.out.batch + n * a.out.token + channel * a.out.channel]);
  }

  Matrix project(const Matrix& rows, const void* weight, const void* bias) const {
    if (weight == nullptr) return rows;
    const T *w = static_cast<const T*>(weight), *add = static_cast<const T*>(bias);
    Matrix result(rows.size(), std::vector<double>(c.channels));
    for (size_t i = 0; i < rows.size(); ++i)
      for (int o = 0; o < c.channels; ++o) {
        result[i][o] = load(add[o]);
        for (int k = 0; k < c.channels; ++k) result[i][o] += rows[i][k] * load(w[o * c.channels + k]);
      }
    return result;
  }

  Matrix pool(const Matrix& rows, const RoundArgs& r) const {
    Matrix result(r.centres(), std::vector<double>(c.channels));
    for (int o = 0; o < r.centres(); ++o) {
      const Bin bin = bin_of(r, o);
      const double pixels = (bin.bottom - bin.top) * (bin.right - bin.left);
      for (int y = bin.top; y < bin.bottom; ++y)
        for (int x_ = bin.left; x_ < bin.right; ++x_)
          for (int k = 0; k < c.channels; ++k) result[o][k] += rows[y * r.width + x_][k] / pixels;
    }
    return result;
  }

  static double dot(const std::vector<double>& p, const std::vector<double>& q) {
    double sum = 0;
    for (size_t i = 0; i < p.size(); ++i) sum += p[i] * q[i];
    return sum;
  }
  double weight(int t, double cosine) const {
    return c.dense ? 1 : 1 / (1 + std::exp(-(beta[t] + double{alpha[t]} * cosine)));
  }

  // One round: tokens become its centres; cosines [N, O]. Counts labels that are not the best, within
  // float32.
  int round(int b, int t, Matrix& tokens, Matrix& cosines) const {
    const RoundArgs& r = a.round[t];
    const Matrix keys = project(tokens, r.key_weight, r.key_bias), pooled = pool(tokens, r),
                 centres = project(pooled, r.key_weight, r.key_bias);
    Matrix means = pooled;
    std::vector<double> mass(r.centres(), 1);
    int wrong = 0;
    cosines.assign(r.tokens(), std::vector<double>(r.centres()));
    for (int n = 0; n < r.tokens(); ++n) {
      const int label = labels[b * a.label_stride + r.labels + n];
      if (label < 0 || label >= r.centres()) return 1;
      const double order = c.dense || alpha[t] > 0 ? 1 : -1;
      double best = -2;
      for (int o = 0; o < r.centres(); ++o) {
        cosines[n][o] =
            dot(keys[n], centres[o]) / std::sqrt(dot(keys[n], keys[n]) * dot(centres[o], centres[o]));
        best = std::fmax(best, order * cosines[n][o]);
      }
      const double own = cosines[n][label], w = weight(t, own);
      wrong += order * own < best - 3e-6;
      wrong += !(std::fabs(saved[b * a.saved_stride + r.saved.cosine + n] - own) < 3e-6);
      mass[label] += w;
      for (int k = 0; k < c.channels; ++k) means[label][k] += w * tokens[n][k];
    }
    for (int o = 0; o < r.centres(); ++o)
      for (double& v : means[o]) v /= mass[o];
    tokens = project(means, r.value_weight, r.value_bias);
    return wrong;
  }

  int wrong_of(int b) const {
    const int count = a.round[0].tokens();
    Matrix tokens(count, std::vector<double>(c.channels)), product, cosines;
    for (int n = 0; n < count; ++n)
      for (int k = 0; k < c.channels; ++k) tokens[n][k] = at(x, b, n, k);
    std::vector<int> place(count);
    std::vector<double> chain(count, 1);
    for (int n = 0; n < count; ++n) place[n] = n;
    for (int t = 0; t < a.count; ++t) {
      if (const int wrong = round(b, t, tokens, cosines)) return wrong;
      for (int n = 0; n < count; ++n) {
        const int label = labels[b * a.label_stride + a.round[t].labels + place[n]];
        chain[n] *= weight(t, cosines[place[n]][label]);
        place[n] = label;
      }
      if (t == 0) {
        product = cosines;
        continue;
      }
      for (std::vector<double>& row : product) {
        std::vector<double> next(a.round[t].centres());
        for (size_t o = 0; o < row.size(); ++o)
          for (size_t j = 0; j < next.size(); ++j) next[j] += row[o] * cosines[o][j];
        row = next;
      }
    }
    int wrong = 0;
    for (int n = 0; n < count; ++n)
      for (int k = 0; k < c.channels; ++k) {
        double want = c.dense ? 0 : chain[n] * tokens[place[n]][k];
        for (int j = 0; c.dense && j < a.columns; ++j)
          want += tokens[j][k] / (1 + std::exp(-(beta[0] + double{alpha[0]} * product[n][j])));
        const double rounding = sizeof(T) == 4 ? 0 : 0x1p-8 * std::fabs(want);
        wrong += !(std::fabs(at(out, b, n, k) - want) <= 1e-5 + rounding);
      }
    return wrong;
  }
};

template <class T>
int check(const Case& c) {
  Problem<T> p(c);
  int wrong = run_icm<T>(p.a, nullptr) != cudaSuccess;
  for (int b = 0; b < p.kBatch; ++b) wrong += p.wrong_of(b);
  if (wrong)
    std::printf("%zu bytes, C %d, %s, projected %d, team of %d, %d bytes: %d wrong\n", sizeof(T), c.channels,
                c.dense ? "dense" : "masked", c.projected, c.team, c.shared_limit, wrong);
  return wrong;
}

constexpr int kRoomy = 232448, kTight = kBlockElements * 4, kTilesOnly = kTight + 2 * 4 * kTileRows * 100;

template <class T>
int check_all() {
  const std::vector<Grid> pyramid{{5, 7}, {3, 4}, {3, 3}, {1, 2}}, deep{{3, 4}, {4, 5}, {1, 1}},
      wide{{9, 8}, {8, 9}, {3, 12}};
  constexpr bool kFloat = sizeof(T) == 4;
  int wrong = check<T>({32, pyramid, kFloat, true, 8, kRoomy});
  wrong += check<T>({32, pyramid, !kFloat, true, 1, kTight});
  wrong += check<T>({20, deep, kFloat, true, 8, kTight});
  wrong += check<T>({7, deep, !kFloat, false, 1, kRoomy, true});
  return wrong + check<T>({32, wide, !kFloat, false, kFloat ? 8 : 1, kTilesOnly});
}

}  // namespace

int main() {
  const int wrong = check_all<float>() + check_all<bf16>();
  std::printf("%d wrong\n", wrong);
  return wrong != 0;
}
