// What Python sees of strings in files and of texts of tokens; the rest is in bindings.cpp.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <string_view>
#include <utility>

#include "suffix_automaton.h"

namespace nb = nanobind;
using namespace octavo;

namespace {

// --- strings of a GGUF file: a uint64 length and its bytes, one after another ---

using FileBytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu, nb::ro>;
using Offsets = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Offsets of the strings' first bytes, for as many as lie wholly before `end`; (how many, where the next one begins).
std::pair<std::size_t, std::size_t> locate_strings(const FileBytes& file, std::size_t start, std::size_t end,
                                                   const Offsets& starts) {
  const std::size_t size = std::min<std::size_t>(file.shape(0), end);
  std::size_t position = start;
  for (std::size_t i = 0; i < starts.shape(0); ++i) {
    uint64_t length;
    if (position > size || size - position < sizeof length) return {i, position};
    std::memcpy(&length, file.data() + position, sizeof length);
    if (length > size - position - sizeof length) return {i, position};
    position += sizeof length;
    starts.data()[i] = static_cast<int64_t>(position);
    position += length;
  }
  return {starts.shape(0), position};
}

// Where a string begins and ends.
std::pair<const char*, const char*> string_at(const FileBytes& file, const Offsets& starts, const Offsets& ends,
                                              std::size_t i) {
  if (starts.shape(0) != ends.shape(0)) throw nb::value_error("strings: a start and an end for each");
  const int64_t from = starts.data()[i];
  const int64_t to = ends.data()[i];
  if (from < 0 || to < from || static_cast<std::size_t>(to) > file.shape(0)) {
    throw nb::index_error("strings: outside the file");
  }
  const char* data = reinterpret_cast<const char*>(file.data());
  return {data + from, data + to};
}

// Bytes that are not UTF-8 become lone surrogates.
nb::list decode_strings(const FileBytes& file, const Offsets& starts, const Offsets& ends) {
  nb::list strings;
  for (std::size_t i = 0; i < starts.shape(0); ++i) {
    const auto [begin, end] = string_at(file, starts, ends, i);
    PyObject* text = PyUnicode_DecodeUTF8(begin, end - begin, "surrogateescape");
    if (text == nullptr) throw nb::python_error();
    strings.append(nb::steal(text));
  }
  return strings;
}

// Each string as the two around its only space; None if one is not of that form or not UTF-8, for somebody else to say
// what is wrong.
nb::object decode_pairs(const FileBytes& file, const Offsets& starts, const Offsets& ends) {
  nb::list pairs;
  for (std::size_t i = 0; i < starts.shape(0); ++i) {
    const auto [begin, end] = string_at(file, starts, ends, i);
    const char* space = std::find(begin, end, ' ');
    if (space == begin || space + 1 >= end || std::find(space + 1, end, ' ') != end) return nb::none();
    PyObject* left = PyUnicode_DecodeUTF8(begin, space - begin, "strict");
    PyObject* right = left == nullptr ? nullptr : PyUnicode_DecodeUTF8(space + 1, end - space - 1, "strict");
    if (right == nullptr) {
      Py_XDECREF(left);
      PyErr_Clear();
      return nb::none();
    }
    pairs.append(nb::make_tuple(nb::steal(left), nb::steal(right)));
  }
  return pairs;
}

// Which of the strings, none of them empty, occur in a text of bytes. Of strings of two parts with a space between, the
// parts put together do, if `pairs`.
std::vector<int64_t> strings_within(const FileBytes& file, const Offsets& starts, const Offsets& ends,
                                    const nb::bytes& text, bool pairs) {
  SuffixAutomaton automaton;
  for (const char letter : std::string_view(text.c_str(), text.size())) automaton.extend(static_cast<uint8_t>(letter));
  std::vector<int64_t> found;
  for (std::size_t i = 0; i < starts.shape(0); ++i) {
    const auto [begin, end] = string_at(file, starts, ends, i);
    if (begin == end || static_cast<std::size_t>(end - begin) > text.size() + 1) continue;
    const char* space = pairs ? std::find(begin, end, ' ') : end;
    const std::string_view right(space == end ? end : space + 1, end);
    if (automaton.holds({begin, space}, right)) found.push_back(static_cast<int64_t>(i));
  }
  return found;
}

}  // namespace

void bind_texts(nb::module_& m) {
  m.def("locate_strings", &locate_strings, nb::arg("file"), nb::arg("start"), nb::arg("end"),
        nb::arg("starts").noconvert(), "Fill `starts` with offsets; (how many were found, where the next one begins).");
  m.def("decode_strings", &decode_strings, nb::arg("file"), nb::arg("starts").noconvert(), nb::arg("ends").noconvert());
  m.def("strings_within", &strings_within, nb::arg("file"), nb::arg("starts").noconvert(), nb::arg("ends").noconvert(),
        nb::arg("text"), nb::arg("pairs"), "Indices of the strings that occur in a text.");
  m.def("decode_pairs", &decode_pairs, nb::arg("file"), nb::arg("starts").noconvert(), nb::arg("ends").noconvert());
  nb::class_<SuffixAutomaton>(m, "SuffixAutomaton",
                              "Of a growing text of token ids: where its suffixes occurred before.")
      .def(nb::init<>())
      .def("copy", [](const SuffixAutomaton& self) { return SuffixAutomaton(self); })
      .def(
          "extend",
          [](SuffixAutomaton& self, const std::vector<int32_t>& tokens) {
            for (const int32_t token : tokens) self.extend(token);
          },
          nb::arg("tokens"), "Append tokens; a negative one separates texts.")
      .def(
          "own",
          [](const SuffixAutomaton& self) {
            const auto match = self.own();
            return std::make_tuple(match.state, match.length);
          },
          "(state, length) of the longest suffix of the text that occurs before its end as well.")
      .def(
          "follow",
          [](const SuffixAutomaton& self, std::tuple<int32_t, int32_t> match, const std::vector<int32_t>& tokens) {
            SuffixAutomaton::Match now = self.checked({std::get<0>(match), std::get<1>(match)});
            for (const int32_t token : tokens) now = self.follow(now, token);
            return std::make_tuple(now.state, now.length);
          },
          nb::arg("match"), nb::arg("tokens"), "The match of another text, when tokens were appended to that.")
      .def(
          "earliest",
          [](const SuffixAutomaton& self, int32_t max_length, int32_t max_tokens) {
            const auto [end, length] = self.earliest(max_length);
            const auto from = self.tokens().begin() + end;
            const auto count = std::min<std::ptrdiff_t>(std::max(max_tokens, 0), self.tokens().end() - from);
            return std::make_tuple(length, std::vector<int32_t>(from, from + (length > 0 ? count : 0)));
          },
          nb::arg("max_length"), nb::arg("max_tokens"),
          "How long a suffix of the text occurs before, up to `max_length`, and what followed it first.")
      .def(
          "guess",
          [](const SuffixAutomaton& self, std::tuple<int32_t, int32_t> match, int32_t max_tokens,
             const std::vector<float>& rates, float min_chance, float min_share, int32_t branches) {
            auto guess = self.guess(self.checked({std::get<0>(match), std::get<1>(match)}), max_tokens, rates,
                                    min_chance, min_share, branches);
            return std::make_tuple(std::move(guess.tokens), std::move(guess.parents), std::move(guess.kinds),
                                   std::move(guess.chances));
          },
          nb::arg("match"), nb::arg("max_tokens"), nb::arg("rates"), nb::arg("min_chance"), nb::arg("min_share"),
          nb::arg("branches") = 1, "(tokens, parents, kinds, chances) of what may follow a match, the likeliest first.")
      .def_static("kind_of", &SuffixAutomaton::kind_of, nb::arg("length"), nb::arg("taken"), nb::arg("of_all"),
                  "Of a guess, by which its chance is known.")
      .def_prop_ro("num_tokens", [](const SuffixAutomaton& self) { return self.tokens().size(); })
      .def_prop_ro("nbytes", &SuffixAutomaton::nbytes);
}
