// The scan of the shadow by one block of queries.
#pragma once
#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/topk_search.h"

namespace fct::cpu {

// A row that is likely near, by the first dimensions of its head.
struct Likely {
    float estimate;
    int64_t id;
};

// One block of queries, quantised and laid out for the scan. Parts of a gallery are scanned with copies.
class ScanBlock {
  public:
    // whole: reads whole bytes also where the shadow is in halves and the queries are few.
    ScanBlock(const Search& s, std::vector<int64_t> queries, bool whole = false);

    int64_t tails() const { return tails_read_; }
    bool usable(int64_t q) const { return facts_[static_cast<size_t>(q)].usable; }

    // Tiles [from, to); candidates of query q into found[q]. Returns the places of the queries whose guess failed.
    //
    // A threshold proven by k rows of the tiles seen so far is low at first, and every row above it costs: k log(n / k)
    // rows come and go before the last k stand. With `guess`, tiles are visited in a scattered order, so that those
    // seen are a sample of all, and the threshold is the key of a rank in the sample that the k-th best row of all
    // will, very probably, not be below: after a share t of the tiles the k t-th and 4.5 standard deviations more. At
    // the end k rows must reach it, which proves it; where they do not (rows in the order of their clusters are no
    // fair sample), the query has to be scanned again without a guess.
    //
    // best (or null): thresholds of these queries that other parts have proven, to learn from and to add to.
    std::vector<int64_t> scan(const Search& s, int64_t from, int64_t to, bool guess, Candidates* found, int worker,
                              Proven* best);

    // With levels: the rows of tiles [from, to) that are likely nearest to query q, into likely[q]. They need not be
    // right: thresholds come from their exact scores.
    void foresee(const Search& s, int64_t from, int64_t to, std::vector<Likely>* likely, int worker) const;
    // What k of these rows, scored exactly, reach; minus infinity where there are fewer.
    double reached_by(const Search& s, int64_t q, std::vector<Likely>& likely) const;

  private:
    struct Facts {
        double scale, tail_scale;  // of the 8-bit query: of its head where the shadow has levels
        double length, error, constant;
        double by_error, by_norm, by_all;  // a row's margin: times its error, times its norm, and besides half
        int32_t tail_init;
        bool usable;
    };

    void lay_out(const Search& s);
    void take(const Search& s, size_t i, int32_t* words, int group, int j, double* v);
    void take_levels(const Search& s, size_t i, const double* v, double length, int8_t* bytes);
    void take_whole(const Search& s, size_t i, const double* v, int8_t* bytes);
    void set_base(int64_t q, double tau);
    size_t room_for(const Search& s, size_t kept) const;
    void learn(const Search& s, Candidates* found, Proven* best);
    void push(const Search& s, int64_t q, int64_t t, const ScanTile& tile, uint64_t mask, const float* keys,
              Candidates& found);
    bool settle_halves(const Search& s, int64_t q, Candidates& found, Proven* best);
    void settle(const Search& s, int64_t q, int64_t t, uint64_t mask, const float* keys, Candidates& found);
    bool consider(const Search& s, int64_t q, int64_t id, double key, double margin, Candidates& found);

    std::vector<int64_t> queries_;
    int64_t count_, steps_, rank_ = 0;
    bool few_;  // reads the high halves alone
    int64_t tails_read_ = 0;
    size_t most_ = 0;  // candidates, beyond which a query goes through every row
    std::vector<std::pair<int64_t, int>> groups_;
    std::vector<int32_t> words_, init_;
    std::vector<float> inverse_, base_, per_error_, per_norm_, per_half_, per_tail_, threshold_, limit_, limit_inverse_;
    std::vector<Facts> facts_;
    int64_t tail_stride_ = 0;
    std::vector<int8_t> tails_;
};

}  // namespace fct::cpu
