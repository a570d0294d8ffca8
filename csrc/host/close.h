// The next of a row of hashes that differs from one in few bits, with the processor's own bit counting if it has any.
#pragma once

#include <cstdint>

namespace ff {

// The smallest i in [begin, end) at which values[i] differs from value in at most max_distance bits, else end.
using NextClose = int64_t (*)(const uint64_t* values, int64_t begin, int64_t end, uint64_t value, int max_distance);

// The fastest that runs here.
NextClose next_close();

}  // namespace ff
