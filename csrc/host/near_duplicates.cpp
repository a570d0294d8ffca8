// Multi-index hashing, band within band.
//
// Two hashes that differ in at most d bits agree in one of d + 1 bands of bits. So for each band the hashes are dealt
// to buckets by its bits, and only hashes of one bucket can be a pair. Within a bucket the band's bits are dropped, for
// they are equal, and what is left is the same question with fewer bits: a large bucket, be it for the number of
// hashes or because images have much in common, is dealt again. A pair that several bands would find belongs to the
// first of them.
#include "near_duplicates.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <memory>
#include <numeric>
#include <tuple>
#include <utility>

#include "../parallel.h"
#include "close.h"

namespace ff {

namespace {

constexpr int hash_bits = 64;
constexpr int64_t max_tasks = 512;
constexpr int max_key_bits = 16;

// The bits of a hash in another order, which leaves distances as they are: the neighbours in an image, which tend to
// be equal together, come apart into different bands.
class Shuffle {
 public:
  Shuffle() {
    for (int byte = 0; byte < 8; ++byte)
      for (int value = 0; value < 256; ++value)
        for (int bit = 0; bit < 8; ++bit)
          if (value >> bit & 1) table_[byte][value] |= uint64_t{1} << ((8 * byte + bit) * 29 % hash_bits);
  }
  uint64_t operator()(uint64_t hash) const {
    uint64_t shuffled = 0;
    for (int byte = 0; byte < 8; ++byte) shuffled |= table_[byte][hash >> 8 * byte & 255];
    return shuffled;
  }

 private:
  uint64_t table_[8][256] = {};
};

// The bits of a value that decide its bucket.
struct Key {
  int shift, width;
  uint64_t of(uint64_t value) const { return value >> shift & ((uint64_t{1} << width) - 1); }
  // The value without these bits.
  uint64_t drop(uint64_t value) const {
    const uint64_t below = (uint64_t{1} << shift) - 1;
    const int above = shift + width;
    return (value & below) | (above < hash_bits ? value >> above << shift : 0);
  }
};

// Values and their numbers, dealt to buckets: bucket k is [begin[k], begin[k + 1]).
struct Dealt {
  std::vector<uint64_t> values;
  std::vector<uint32_t> ids;
  std::vector<uint32_t> begin;

  // ids may be null, for 0, 1, 2, ...; the order within a bucket is the order given, whatever `threads`.
  template <bool dropping>
  void deal(int threads, const uint64_t* from, const uint32_t* from_ids, int64_t count, Key key) {
    const int64_t buckets = int64_t{1} << key.width, parts = count < (1 << 16) ? 1 : std::max(threads, 1);
    if (static_cast<int64_t>(values.size()) < count) {
      values.resize(count);
      ids.resize(count);
    }
    next_.assign(parts * buckets, 0);
    parallel(threads, parts, [&](int64_t part) {
      uint32_t* next = next_.data() + part * buckets;
      for (int64_t i = part_begin(count, parts, part); i < part_begin(count, parts, part + 1); ++i)
        ++next[key.of(from[i])];
    });
    begin.resize(buckets + 1);
    uint32_t sum = 0;
    for (int64_t bucket = 0; bucket < buckets; ++bucket) {
      begin[bucket] = sum;
      for (int64_t part = 0; part < parts; ++part) sum += std::exchange(next_[part * buckets + bucket], sum);
    }
    begin[buckets] = sum;
    parallel(threads, parts, [&](int64_t part) {
      uint32_t* next = next_.data() + part * buckets;
      for (int64_t i = part_begin(count, parts, part); i < part_begin(count, parts, part + 1); ++i) {
        const uint32_t at = next[key.of(from[i])]++;
        values[at] = dropping ? key.drop(from[i]) : from[i];
        ids[at] = from_ids ? from_ids[i] : static_cast<uint32_t>(i);
      }
    });
  }

 private:
  std::vector<uint32_t> next_;
};

// The different hashes, shuffled and in order, and where each occurs: members[begin[k]] ... are ascending.
struct Distinct {
  std::vector<uint64_t> values;
  std::vector<uint32_t> members, begin;

  Distinct(int threads, const uint64_t* hashes, int64_t count) {
    const Shuffle shuffle;
    std::vector<uint64_t> shuffled(count);
    const int64_t step = 1 << 16;
    parallel(threads, (count + step - 1) / step, [&](int64_t task) {
      for (int64_t i = task * step; i < std::min(count, task * step + step); ++i) shuffled[i] = shuffle(hashes[i]);
    });
    const int width = std::clamp(static_cast<int>(std::bit_width(static_cast<uint64_t>(count))), 1, max_key_bits);
    Dealt dealt;
    dealt.deal<false>(threads, shuffled.data(), nullptr, count, {hash_bits - width, width});
    const int64_t buckets = int64_t{1} << width, tasks = std::min(buckets, max_tasks);
    parallel(threads, tasks, [&](int64_t task) {
      std::vector<std::pair<uint64_t, uint32_t>> run;
      for (int64_t bucket = buckets * task / tasks; bucket < buckets * (task + 1) / tasks; ++bucket) {
        const int64_t first = dealt.begin[bucket], last = dealt.begin[bucket + 1];
        run.clear();
        for (int64_t i = first; i < last; ++i) run.emplace_back(dealt.values[i], dealt.ids[i]);
        std::sort(run.begin(), run.end());
        for (int64_t i = first; i < last; ++i) std::tie(dealt.values[i], dealt.ids[i]) = run[i - first];
      }
    });
    members = std::move(dealt.ids);
    values = std::move(shuffled);
    int64_t found = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (i && dealt.values[i] == dealt.values[i - 1]) continue;
      values[found++] = dealt.values[i];
      begin.push_back(static_cast<uint32_t>(i));
    }
    values.resize(found);
    begin.push_back(static_cast<uint32_t>(count));
  }

  int64_t size() const { return static_cast<int64_t>(values.size()); }
};

// Where the bits of a value stand in the hash.
struct Bits {
  int count = hash_bits;
  std::array<uint8_t, hash_bits> origin;

  Bits() { std::iota(origin.begin(), origin.end(), 0); }
  Bits without(Key key) const {
    Bits rest = *this;
    std::copy(origin.begin() + key.shift + key.width, origin.begin() + count, rest.origin.begin() + key.shift);
    rest.count -= key.width;
    return rest;
  }
  uint64_t mask(Key key) const {
    uint64_t mask = 0;
    for (int bit = key.shift; bit < key.shift + key.width; ++bit) mask |= uint64_t{1} << origin[bit];
    return mask;
  }
};

// The search among `all`, which are different; found(a, b, distance) of numbers in `all` returns whether to go on.
class Search {
 public:
  Search(const std::vector<uint64_t>& all, int max_distance) : all_(all), max_distance_(max_distance) {}

  // make(task) gives the `found` of a task.
  template <class Make>
  void run(int threads, const Make& make) {
    const int64_t count = static_cast<int64_t>(all_.size());
    const Bits bits;
    if (!worth_dealing(count, bits)) {
      auto found = make(0);
      Worker<decltype(found)>{*this, found, {}, {}}.compare(all_.data(), nullptr, count);
      return;
    }
    Dealt dealt;
    std::vector<uint64_t> earlier;
    for (int band = 0; band <= max_distance_ && !stopped_; ++band) {
      const Key key = key_of(count, bits, band);
      dealt.deal<true>(threads, all_.data(), nullptr, count, key);
      const Bits rest = bits.without(key);
      const int64_t buckets = int64_t{1} << key.width, tasks = std::min(buckets, max_tasks);
      parallel(threads, tasks, [&](int64_t task) {
        auto found = make(task);
        Worker<decltype(found)> worker{*this, found, earlier, {}};
        for (int64_t k = buckets * task / tasks; k < buckets * (task + 1) / tasks && !stopped_; ++k)
          worker.search(dealt.values.data() + dealt.begin[k], dealt.ids.data() + dealt.begin[k],
                        dealt.begin[k + 1] - dealt.begin[k], rest, 0);
      });
      earlier.push_back(bits.mask(key));
    }
  }

 private:
  Key key_of(int64_t count, const Bits& bits, int band) const {
    const int width = bits.count / (max_distance_ + 1);
    const int enough = static_cast<int>(std::bit_width(static_cast<uint64_t>(count)));
    return {band * width, std::min({width, max_key_bits, enough})};
  }

  // Dealing handles every value once a band; it must spare more comparisons than that.
  bool worth_dealing(int64_t count, const Bits& bits) const {
    const int bands = max_distance_ + 1, width = std::min(bits.count / bands, max_key_bits);
    return count > 64 * bands && (int64_t{1} << width) >= 2 * bands;
  }

  template <class Found>
  struct Worker {
    Search& search_;
    Found& found_;
    std::vector<uint64_t> earlier_;  // pairs that agree in one of these belong to another bucket
    std::vector<std::unique_ptr<Dealt>> dealt_;

    void search(const uint64_t* values, const uint32_t* ids, int64_t count, const Bits& bits, size_t depth) {
      if (count < 2) return;
      if (!search_.worth_dealing(count, bits)) return compare(values, ids, count);
      if (dealt_.size() <= depth) dealt_.push_back(std::make_unique<Dealt>());
      Dealt& dealt = *dealt_[depth];
      const size_t known = earlier_.size();
      for (int band = 0; band <= search_.max_distance_ && !search_.stopped_; ++band) {
        const Key key = search_.key_of(count, bits, band);
        dealt.template deal<true>(1, values, ids, count, key);
        const Bits rest = bits.without(key);
        for (int64_t k = 0; k < int64_t{1} << key.width; ++k)
          search(dealt.values.data() + dealt.begin[k], dealt.ids.data() + dealt.begin[k],
                 dealt.begin[k + 1] - dealt.begin[k], rest, depth + 1);
        earlier_.push_back(bits.mask(key));
      }
      earlier_.resize(known);
    }

    void compare(const uint64_t* values, const uint32_t* ids, int64_t count) {
      const int max_distance = search_.max_distance_;
      for (int64_t i = 0; i + 1 < count; ++i) {
        for (int64_t j = i + 1; (j = search_.next_(values, j, count, values[i], max_distance)) < count; ++j) {
          const uint32_t a = ids ? ids[i] : static_cast<uint32_t>(i), b = ids ? ids[j] : static_cast<uint32_t>(j);
          const uint64_t differing = search_.all_[a] ^ search_.all_[b];
          const auto agrees = [&](uint64_t mask) { return !(differing & mask); };
          if (std::any_of(earlier_.begin(), earlier_.end(), agrees)) continue;
          if (!found_(a, b, static_cast<uint32_t>(std::popcount(differing)))) {
            search_.stopped_ = true;
            return;
          }
        }
        if (search_.stopped_) return;
      }
    }
  };

  const std::vector<uint64_t>& all_;
  const int max_distance_;
  const NextClose next_ = next_close();
  std::atomic<bool> stopped_ = false;
};

// Pairs that tasks find, a list for each, and together no more than allowed.
class Pairs {
 public:
  Pairs(int64_t tasks, int64_t most) : lists_(tasks), most_(most) {}
  // Whether `count` more are still allowed.
  bool allow(int64_t count) { return (total_ += count) <= most_; }
  void add(int64_t task, uint32_t a, uint32_t b, uint32_t distance) { lists_[task].push_back({a, b, distance}); }
  bool complete() const { return total_ <= most_; }

  std::vector<Pair> sorted() {
    std::vector<Pair> all;
    if (!complete()) return all;
    all.reserve(total_);
    for (auto& list : lists_) {
      all.insert(all.end(), list.begin(), list.end());
      std::vector<Pair>().swap(list);
    }
    std::sort(all.begin(), all.end(),
              [](const Pair& a, const Pair& b) { return std::tie(a.first, a.second) < std::tie(b.first, b.second); });
    return all;
  }

 private:
  std::vector<std::vector<Pair>> lists_;
  const int64_t most_;
  std::atomic<int64_t> total_ = 0;
};

// Union-find without locks: a root is only ever hung below a smaller one, so the last root is the smallest of all.
class Groups {
 public:
  explicit Groups(int64_t count) : parent_(count) {
    for (int64_t i = 0; i < count; ++i) parent_[i] = static_cast<uint32_t>(i);
  }
  uint32_t root(uint32_t i) {
    for (uint32_t up = parent_[i]; up != i; up = parent_[i]) {
      const uint32_t above = parent_[up];
      if (above != up) parent_[i].compare_exchange_weak(up, above);
      i = above;
    }
    return i;
  }
  void join(uint32_t a, uint32_t b) {
    while ((a = root(a)) != (b = root(b))) {
      if (a < b) std::swap(a, b);
      uint32_t expected = a;
      if (parent_[a].compare_exchange_strong(expected, b)) return;
    }
  }

 private:
  std::vector<std::atomic<uint32_t>> parent_;
};

}  // namespace

std::vector<Pair> near_duplicates(int threads, const uint64_t* hashes, int64_t count, int max_distance,
                                  int64_t max_pairs, bool& complete) {
  const Distinct distinct(threads, hashes, count);
  const auto& begin = distinct.begin;
  const auto& members = distinct.members;
  Pairs pairs(max_tasks, max_pairs);
  for (int64_t k = 0; k < distinct.size(); ++k) {
    const int64_t same = begin[k + 1] - begin[k];
    if (same > 1 && !pairs.allow(same * (same - 1) / 2)) break;
    for (int64_t i = begin[k]; i < begin[k + 1]; ++i)
      for (int64_t j = i + 1; j < begin[k + 1]; ++j) pairs.add(0, members[i], members[j], 0);
  }
  if (max_distance && pairs.complete()) {
    Search(distinct.values, max_distance).run(threads, [&](int64_t task) {
      return [&, task](uint32_t a, uint32_t b, uint32_t distance) {
        const int64_t more = int64_t{begin[a + 1] - begin[a]} * (begin[b + 1] - begin[b]);
        if (!pairs.allow(more)) return false;
        for (uint32_t i = begin[a]; i < begin[a + 1]; ++i)
          for (uint32_t j = begin[b]; j < begin[b + 1]; ++j)
            pairs.add(task, std::min(members[i], members[j]), std::max(members[i], members[j]), distance);
        return true;
      };
    });
  }
  complete = pairs.complete();
  return pairs.sorted();
}

void near_duplicate_groups(int threads, const uint64_t* hashes, int64_t count, int max_distance, int64_t* labels) {
  const Distinct distinct(threads, hashes, count);
  const auto& begin = distinct.begin;
  const auto& members = distinct.members;
  Groups groups(count);
  for (int64_t k = 0; k < distinct.size(); ++k)
    for (int64_t i = begin[k] + 1; i < begin[k + 1]; ++i) groups.join(members[begin[k]], members[i]);
  if (max_distance) {
    Search(distinct.values, max_distance).run(threads, [&](int64_t) {
      return [&](uint32_t a, uint32_t b, uint32_t) {
        groups.join(members[begin[a]], members[begin[b]]);
        return true;
      };
    });
  }
  for (int64_t i = 0; i < count; ++i) labels[i] = groups.root(static_cast<uint32_t>(i));
}

std::vector<Pair> near_matches(int threads, const uint64_t* queries, int64_t num_queries, const uint64_t* hashes,
                               int64_t count, int max_distance, int64_t max_pairs, bool& complete) {
  constexpr int64_t step = 1 << 12;  // hashes that stay in the nearest cache while every query passes
  const NextClose next = next_close();
  constexpr int64_t worth_threads = 1 << 24;  // comparisons, about 2 ms of them
  if (num_queries <= worth_threads / std::max<int64_t>(count, 1)) threads = 1;
  const int64_t blocks = (count + step - 1) / step, tasks = std::min(blocks, max_tasks);
  Pairs pairs(std::max<int64_t>(tasks, 1), max_pairs);
  parallel(threads, tasks, [&](int64_t task) {
    for (int64_t block = blocks * task / tasks; block < blocks * (task + 1) / tasks; ++block) {
      const int64_t end = std::min(count, block * step + step);
      for (int64_t q = 0; q < num_queries; ++q) {
        for (int64_t i = block * step; (i = next(hashes, i, end, queries[q], max_distance)) < end; ++i) {
          if (!pairs.allow(1)) return;
          pairs.add(task, static_cast<uint32_t>(q), static_cast<uint32_t>(i),
                    static_cast<uint32_t>(std::popcount(queries[q] ^ hashes[i])));
        }
      }
    }
  });
  complete = pairs.complete();
  return pairs.sorted();
}

}  // namespace ff
