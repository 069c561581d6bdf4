// Python bindings of metrics.h over contiguous NumPy arrays.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "native/metrics.h"

namespace frd::native {

// Never converts: a copy of the wrong dtype or layout would hide a slow call.
using Scores = pybind11::array_t<float, pybind11::array::c_style>;
using Truth = pybind11::array_t<uint8_t, pybind11::array::c_style>;

inline int64_t common_size(const Scores& score, const Truth& truth) {
  if (score.ndim() != 1 || truth.ndim() != 1 || score.size() != truth.size())
    throw pybind11::value_error("truth must be a flat array of score's size " + std::to_string(score.size()) +
                                ", got " + std::to_string(truth.size()));
  return score.size();
}

inline void bind_metrics(pybind11::module_& m) {
  m.def(
      "confusion_counts",
      [](const Scores& score, const Truth& truth, float threshold) {
        const int64_t n = common_size(score, truth);
        const auto c = confusion_counts(score.data(), truth.data(), n, threshold);
        return pybind11::make_tuple(c.tp, c.fp, c.fn, c.tn);
      },
      pybind11::arg("score").noconvert(), pybind11::arg("truth").noconvert(), pybind11::arg("threshold"),
      "(tp, fp, fn, tn) of score [n] float32 > threshold against truth [n] uint8 in {0, 1}.");
  m.def(
      "auc_counts",
      [](const Scores& score, const Truth& truth) {
        const int64_t n = common_size(score, truth);
        const float* scores = score.data();
        const uint8_t* classes = truth.data();
        AucCounts c;
        {
          const pybind11::gil_scoped_release release;
          c = auc_counts(scores, classes, n);
        }
        return pybind11::make_tuple(c.twice_u, c.positives, c.negatives);
      },
      pybind11::arg("score").noconvert(), pybind11::arg("truth").noconvert(),
      "(2 U, positives, negatives) of score [n] float32 without NaN and truth [n] uint8 in {0, 1}; ties "
      "count one half.");
}

}  // namespace frd::native
