// Splitting bytes into words, in one pass: by a table of bytes, or by an automaton over classes of characters.
//
// Both are told their rule by the caller; see kernels/ops/split_words.py for what they compute.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace tokenzoo {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t NOTES = 1024;
constexpr int64_t PAGE = 128;

bool continues(uint8_t byte) { return (byte & 0xC0) == 0x80; }

// The ends of words, where words longer than `most` bytes (0: any) are cut, between characters if one begins within reach.
// Ends are noted without a branch, which the processor could not foresee, and gone through when there are many.
class Words {
 public:
  Words(const uint8_t* data, int64_t count, int64_t most) : data_(data), most_(most) { ends_.reserve(count / 8 + 1); }

  void end_if(bool ends, int64_t at) {
    noted_[num_noted_] = at;
    num_noted_ += ends;
    if (num_noted_ == NOTES) take_notes();
  }
  Tensor finish(int64_t count, const Tensor& like) {
    take_notes();
    end(count);
    Tensor out = torch::stable::new_empty(like, {static_cast<int64_t>(ends_.size())}, ScalarType::Long);
    if (!ends_.empty()) std::memcpy(out.mutable_data_ptr(), ends_.data(), ends_.size() * sizeof(int64_t));
    return out;
  }

 private:
  void take_notes() {
    for (int64_t i = 0; i < num_noted_; ++i) end(noted_[i]);
    num_noted_ = 0;
  }
  void end(int64_t at) {
    while (most_ && at - start_ > most_) ends_.push_back(start_ = cut(start_ + most_));
    if (at > start_) ends_.push_back(start_ = at);
  }
  int64_t cut(int64_t at) const {
    int64_t back = at;
    while (back > at - 3 && back > start_ + 1 && continues(data_[back])) --back;
    return continues(data_[back]) ? at : back;
  }

  const uint8_t* data_;
  int64_t most_;
  int64_t start_ = 0;
  int64_t num_noted_ = 0;
  int64_t noted_[NOTES];
  std::vector<int64_t> ends_;
};

const uint8_t* bytes(const Tensor& t) { return static_cast<const uint8_t*>(t.const_data_ptr()); }

// A word ends after a byte that the table marks, where the byte before it is not marked; the start counts as marked.
Tensor split_bytes(const Tensor& data, const Tensor& marked, int64_t most) {
  const int64_t count = data.numel();
  const uint8_t *d = bytes(data), *table = bytes(marked);
  STD_TORCH_CHECK(marked.numel() == 256, "expected a table of 256 bytes, got ", marked.numel());
  Words words(d, count, most);
  uint8_t before = 1;
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t here = table[d[i]];
    words.end_if(here & ~before, i + 1);
    before = here;
  }
  return words.finish(count, data);
}

// The character that begins at `at`: its length in bytes and code point; length 0 if none does (one byte is broken), -1 if
// the data ends within it. Well-formed as Unicode's table 3-7 has it.
struct Character {
  int length;
  uint32_t code;
};

Character read(const uint8_t* data, int64_t at, int64_t count) {
  const uint8_t lead = data[at];
  if (lead < 0xC2 || lead > 0xF4) return {0, 0};
  const int length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  const uint8_t low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
  const uint8_t high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
  uint32_t code = lead & (0x7F >> length);
  for (int i = 1; i < length; ++i) {
    if (at + i == count) return {-1, 0};
    const uint8_t byte = data[at + i];
    if (i == 1 ? byte < low || byte > high : !continues(byte)) return {0, 0};
    code = code << 6 | (byte & 0x3F);
  }
  return {length, code};
}

// An automaton [states, classes] over the classes of characters; an entry is 2 * next state + whether a word begins here.
// The class of code point c is classes[pages[c / 128] * 128 + c % 128]; a byte of no character has the class `broken`.
Tensor split_characters(const Tensor& data, const Tensor& pages, const Tensor& classes, const Tensor& automaton, int64_t broken,
                        int64_t most) {
  const int64_t count = data.numel(), width = automaton.size(1);
  const uint8_t *d = bytes(data), *page = bytes(pages), *table = bytes(classes);
  const uint16_t* entries = static_cast<const uint16_t*>(automaton.const_data_ptr());
  STD_TORCH_CHECK(pages.numel() * PAGE == 0x110000, "expected a page for each ", PAGE, " code points, got ", pages.numel());
  STD_TORCH_CHECK(broken >= 0 && broken < width, "expected a class in [0, ", width, "), got ", broken);
  const uint8_t* ascii = table + page[0] * PAGE;
  Words words(d, count, most);
  uint32_t state = 0;
  for (int64_t at = 0; at < count;) {
    int64_t step = 1;
    uint32_t kind = ascii[d[at] & 0x7F];
    if (d[at] >= 0x80) {
      const Character found = read(d, at, count);
      if (found.length < 0) break;  // it belongs to the last word until more is known
      kind = found.length ? table[page[found.code / PAGE] * PAGE + found.code % PAGE] : static_cast<uint32_t>(broken);
      step = std::max(1, found.length);
    }
    const uint32_t entry = entries[state * width + kind];
    words.end_if(entry & 1, at);
    state = entry >> 1;
    at += step;
  }
  return words.finish(count, data);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tokenzoo_native, m) {
  m.def("split_bytes(Tensor data, Tensor marked, int most) -> Tensor");
  m.def("split_characters(Tensor data, Tensor pages, Tensor classes, Tensor automaton, int broken, int most) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tokenzoo_native, CPU, m) {
  m.impl("split_bytes", TORCH_BOX(&split_bytes));
  m.impl("split_characters", TORCH_BOX(&split_characters));
}

}  // namespace tokenzoo
