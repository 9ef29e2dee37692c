// Sixteen gallery rows at a time, as a panel: for the exact scores.
#pragma once
#include <memory>
#include <vector>

#include "cpu/topk_kernels.h"

namespace fct::cpu {

class Panel {
  public:
    Panel(const RowSource& gallery, const TopkKernels& kernel)
        : gallery_(gallery), kernel_(kernel), values_(static_cast<size_t>(gallery.d * kPanel) + kLine) {
        void* start = values_.data();
        size_t room = values_.size() * sizeof(double);
        panel_ = static_cast<double*>(std::align(kLine * sizeof(double), sizeof(double), start, room));
        if (!gallery.in_place()) scratch_.resize(static_cast<size_t>(gallery.d * kPanel));
    }

    template <class Id>
    void load(int64_t count, Id&& id) {
        const float* rows[kPanel];
        for (int r = 0; r < kPanel; ++r) {
            if (r < count) {
                rows[r] = gallery_.row(id(r), scratch_.empty() ? nullptr : scratch_.data() + r * gallery_.d);
            } else {
                rows[r] = rows[r - 1];
            }
        }
        kernel_.pack(rows, gallery_.d, panel_);
    }

    Panel(const Panel&) = delete;

    const double* data() const { return panel_; }

  private:
    static constexpr size_t kLine = 8;  // float64 in a cache line
    const RowSource& gallery_;
    const TopkKernels& kernel_;
    std::vector<double> values_;
    double* panel_;
    std::vector<float> scratch_;
};

}  // namespace fct::cpu
