// Pairs of 64-bit hashes that differ in few bits, all of them, among millions in memory.
#pragma once

#include <cstdint>
#include <vector>

namespace ff {

struct Pair {
  uint32_t first, second, distance;
};

// Every pair first < second of hashes at most max_distance bits apart, sorted. Once there are more than max_pairs the
// search stops, `complete` is false and what was found is of no use.
std::vector<Pair> near_duplicates(int threads, const uint64_t* hashes, int64_t count, int max_distance,
                                  int64_t max_pairs, bool& complete);

// labels[i] = the smallest index that a chain of such pairs leads to from i.
void near_duplicate_groups(int threads, const uint64_t* hashes, int64_t count, int max_distance, int64_t* labels);

// Every pair of a query (first) and a hash (second) at most max_distance bits apart, sorted, by comparing all.
std::vector<Pair> near_matches(int threads, const uint64_t* queries, int64_t num_queries, const uint64_t* hashes,
                               int64_t count, int max_distance, int64_t max_pairs, bool& complete);

}  // namespace ff
