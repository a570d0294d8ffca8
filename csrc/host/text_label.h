// The 64-bit label of a text, as florence_fast/data/labels.py defines it: BLAKE2b (RFC 7693) of the normalised text.
#pragma once

#include <cstdint>
#include <string>

namespace ff {

// Label of `size` bytes that are normalised already.
int64_t label_of_bytes(const unsigned char* bytes, int64_t size);

// Label of a text in ASCII, whose normal form NFKC is itself: lower case, white space collapsed. `plain` is scratch.
int64_t label_of_ascii(const unsigned char* text, int64_t size, std::string& plain);

}  // namespace ff
