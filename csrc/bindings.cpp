// What Python sees of the kernels. Shapes are checked here and in the graph, the GIL is released around every op.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

#include "cpu/graph.h"
#include "cpu/sampler.h"
#include "cpu/weight_files.h"

namespace nb = nanobind;
using namespace octavo;

void bind_texts(nb::module_& m);  // bindings_texts.cpp

namespace {

using Ints = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using IntTable = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using RowOrder = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using PackedRows = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using PyView = std::tuple<int, std::size_t, std::size_t>;  // buffer, first column, columns

View view_of(const PyView& view) { return {std::get<0>(view), std::get<1>(view), std::get<2>(view)}; }
View view_of(const std::optional<PyView>& view) { return view ? view_of(*view) : View{}; }

std::vector<float> vector_of(const Floats& values) { return {values.data(), values.data() + values.shape(0)}; }

const char* const kFormatNames[] = {"F32",  "F16",  "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1",
                                    "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"};

Format format_of(const std::string& name) {
  for (int i = 0; i < 13; ++i) {
    if (name == kFormatNames[i]) return static_cast<Format>(i);
  }
  throw nb::value_error(("no such weight format: " + name).c_str());
}

KVType kv_type_of(const std::string& name) {
  if (name == "float32") return KVType::F32;
  if (name == "float16") return KVType::F16;
  if (name == "int8") return KVType::I8;
  throw nb::value_error(("no such KV type: " + name).c_str());
}

// Bytes of one row of the file's own layout.
std::size_t file_row_bytes(Format format, std::size_t inputs) {
  switch (format) {
    case Format::F32:
      return inputs * 4;
    case Format::F16:
    case Format::BF16:
      return inputs * 2;
    case Format::Q4_0:
      return inputs / 32 * 18;
    case Format::Q4_1:
      return inputs / 32 * 20;
    case Format::Q5_0:
      return inputs / 32 * 22;
    case Format::Q5_1:
      return inputs / 32 * 24;
    case Format::Q8_0:
      return inputs / 32 * 34;
    case Format::Q2_K:
      return inputs / 256 * 84;
    case Format::Q3_K:
      return inputs / 256 * 110;
    case Format::Q4_K:
      return inputs / 256 * 144;
    case Format::Q5_K:
      return inputs / 256 * 176;
    case Format::Q6_K:
      return inputs / 256 * 210;
  }
  return 0;
}

// A part of a weight, the file's rows, their order (null: as they are), and the output of the part that they begin at.
using Packing = std::tuple<std::shared_ptr<Weight>, std::size_t, PackedRows, std::optional<RowOrder>, std::size_t>;

// What is looked at without the interpreter must not be another thread's to change after it was checked: a copy.
template <class Array>
auto copy_of(const Array& array) {
  using Value = std::remove_const_t<typename Array::Scalar>;
  return std::vector<Value>(array.data(), array.data() + array.size());
}

// The order of the rows, checked.
std::vector<int64_t> check(const Packing& packing) {
  const auto& [whole, index, rows, order, at] = packing;
  if (whole == nullptr) throw nb::value_error("pack: no weight");
  if (index >= whole->segments.size()) throw nb::index_error("pack: no such part");
  const Weight::Segment& weight = whole->segments[index];
  if (rows.shape(1) != file_row_bytes(weight.format, whole->inputs))
    throw nb::value_error("pack: rows have the wrong size");
  std::vector<int64_t> chosen;
  if (order) chosen = copy_of(*order);
  const std::size_t count = order ? chosen.size() : rows.shape(0);
  if (at > weight.outputs || count > weight.outputs - at)
    throw nb::value_error("pack: rows past the end of the weight");
  for (const int64_t row : chosen) {
    if (row < 0 || static_cast<std::size_t>(row) >= rows.shape(0)) throw nb::index_error("pack: no such row");
  }
  return chosen;
}

void pack(Machine& machine, const std::vector<Packing>& all) {
  std::vector<std::vector<int64_t>> orders;
  orders.reserve(all.size());
  for (const Packing& packing : all) orders.push_back(check(packing));
  nb::gil_scoped_release release;
  Pool::Session session(machine.pool);
  for (const Packing& packing : all) std::get<0>(packing)->allocate();
  for (std::size_t number = 0; number < all.size(); ++number) {
    const Packing& packing = all[number];
    Weight& whole = *std::get<0>(packing);
    Weight::Segment& weight = whole.segments[std::get<1>(packing)];
    const uint8_t* rows = std::get<2>(packing).data();
    const std::size_t row_bytes = std::get<2>(packing).shape(1);
    const bool ordered = std::get<3>(packing).has_value();
    const std::vector<int64_t>& order = orders[number];
    const std::size_t at = std::get<4>(packing);
    const std::size_t until = at + (ordered ? order.size() : std::get<2>(packing).shape(0));
    // Pieces begin at panel edges, so that no two threads write one panel.
    const std::size_t first_panel = at / kPanel;
    machine.pool.parallel(panels_of(until) - first_panel, 4, [&](std::size_t begin, std::size_t end) {
      const std::size_t from = std::max((first_panel + begin) * kPanel, at);
      const std::size_t to = std::min((first_panel + end) * kPanel, until);
      if (!ordered) {
        pack_rows(weight.format, rows + (from - at) * row_bytes, to - from, row_bytes, whole.inputs, from,
                  weight.packed.data());
        return;
      }
      for (std::size_t output = from; output < to; ++output) {
        const auto row = static_cast<std::size_t>(order[output - at]);
        pack_rows(weight.format, rows + row * row_bytes, 1, row_bytes, whole.inputs, output, weight.packed.data());
      }
    });
  }
}

using Flag = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Without the interpreter; what the system refuses becomes an OSError.
template <class Function>
auto os_errors(const Function& function) {
  try {
    nb::gil_scoped_release release;
    return function();
  } catch (const std::system_error& error) {
    errno = error.code().value();
    PyErr_SetFromErrno(PyExc_OSError);
    throw nb::python_error();
  }
}

void check_packed(const std::vector<std::shared_ptr<Weight>>& weights, bool packed) {
  for (const auto& weight : weights) {
    if (weight == nullptr) throw nb::value_error("no weight");
    if (weight->allocated() != packed) throw nb::value_error(packed ? "a weight is not packed" : "a weight is packed");
  }
}

void unpack(const Weight& whole, std::size_t index, std::size_t first, const Matrix& out) {
  if (index >= whole.segments.size()) throw nb::index_error("unpack: no such part");
  if (!whole.allocated()) throw nb::value_error("unpack: nothing was packed");
  const Weight::Segment& weight = whole.segments[index];
  if (out.shape(1) != whole.inputs || first > weight.outputs || out.shape(0) > weight.outputs - first) {
    throw nb::value_error("unpack: wrong shape");
  }
  nb::gil_scoped_release release;
  for (std::size_t i = 0; i < out.shape(0); ++i) {
    unpack_row(weight.format, weight.packed.data(), whole.inputs, first + i, out.data() + i * whole.inputs);
  }
}

using PyTap = std::tuple<PyView, Ints, Matrix>;  // a view, rows of it, where they are copied to

void run(Graph& graph, const std::vector<int>& bound_ids, const std::vector<Matrix>& bound, const Batch* batch,
         std::size_t rows, const std::vector<PyTap>& wanted) {
  if (bound.size() != bound_ids.size() || bound_ids != graph.bound_buffers()) {
    throw nb::value_error("run: needs the bound buffers in order, then the last op's output");
  }
  std::vector<float*> pointers;
  for (std::size_t i = 0; i < bound.size(); ++i) {
    if (bound[i].shape(0) != rows || bound[i].shape(1) != graph.columns_of(bound_ids[i])) {
      throw nb::value_error("run: a buffer has the wrong shape");
    }
    pointers.push_back(bound[i].data());
  }
  std::vector<Tap> taps;
  for (const auto& [view, chosen, out] : wanted) {
    if (out.shape(0) != chosen.shape(0) || out.shape(1) != std::get<2>(view)) {
      throw nb::value_error("run: rows that are copied have the wrong shape");
    }
    taps.push_back({view_of(view), copy_of(chosen), out.data()});
  }
  nb::gil_scoped_release release;
  graph.run(batch, rows, bound_ids, pointers, taps);
}

// --- rows of logits ---

using Logits = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
// Allowed, forbidden, bias, (repetition, presence, frequency), prompt, (token, times) of the output, all tokens, size
// of n-grams, mask; see Changes.
using PyChanges =
    std::tuple<std::vector<int32_t>, std::vector<int32_t>, std::vector<std::pair<int32_t, double>>,
               std::tuple<double, double, double>, std::vector<int32_t>, std::vector<std::pair<int32_t, std::size_t>>,
               std::vector<int32_t>, std::size_t, std::optional<nb::bytes>>;
// Temperature (0: greedy), top_k (0: off), top_p, min_p, seed, stream, logprobs, changes.
using PyDraw = std::tuple<double, std::size_t, double, double, uint64_t, std::vector<uint64_t>,
                          std::optional<std::size_t>, std::optional<PyChanges>>;
using PyTopK = std::tuple<std::size_t, std::optional<std::size_t>, std::optional<PyChanges>>;
using PyNextLogprobs = std::pair<int32_t, std::size_t>;
// Row, position of what is drawn, kind of want, the want: a list of draws, a PyTopK, sets of tokens, a PyNextLogprobs.
using PyRequest = std::tuple<std::size_t, uint32_t, std::string, nb::object>;

template <class Value>
Value cast_to(const nb::object& given) {
  Value value;
  if (!nb::try_cast<Value>(given, value)) throw nb::type_error("sample: what is wanted is not of the kind's form");
  return value;
}

// From Python's tuples, checked.
class RequestReader {
 public:
  RequestReader(std::size_t rows, std::size_t vocab) : rows_(rows), vocab_(vocab) {}

  RowRequest read(const PyRequest& request) const {
    const auto& [row, position, kind, want] = request;
    if (row >= rows_) throw nb::index_error("sample: no such row");
    if (kind == "sample") {
      std::vector<Draw> draws;
      for (const PyDraw& draw : cast_to<std::vector<PyDraw>>(want)) draws.push_back(read(draw, position));
      return {row, std::move(draws)};
    }
    if (kind == "top_k") {
      const auto [k, logprobs, changes] = cast_to<PyTopK>(want);
      return {row, TopK{k, logprobs, read(changes)}};
    }
    if (kind == "score") {
      Score score{cast_to<std::vector<std::vector<int32_t>>>(want)};
      for (const std::vector<int32_t>& set : score.sets) check(set);
      return {row, std::move(score)};
    }
    if (kind == "next_logprobs") {
      const auto [token, top] = cast_to<PyNextLogprobs>(want);
      check(token);
      return {row, NextLogprobs{token, top}};
    }
    throw nb::value_error(("sample: no such kind of want: " + kind).c_str());
  }

 private:
  Draw read(const PyDraw& draw, uint32_t position) const {
    const auto& [temperature, top_k, top_p, min_p, seed, stream, logprobs, changes] = draw;
    if (!(temperature >= 0.0)) throw nb::value_error("sample: the temperature must be at least 0");
    const uint64_t path = temperature > 0.0 ? stream_id(seed, stream) : 0;
    const NoiseKey key{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), static_cast<uint32_t>(path),
                       static_cast<uint32_t>(path >> 32), position};
    return {temperature == 0.0, {temperature, top_k, top_p, min_p}, key, logprobs, read(changes)};
  }

  std::optional<Changes> read(const std::optional<PyChanges>& given) const {
    if (!given) return std::nullopt;
    Changes changes;
    const auto& [allowed, forbidden, bias, penalties, prompt, output, token_ids, ngram_size, mask] = *given;
    for (const std::vector<int32_t>* tokens : {&allowed, &forbidden, &prompt, &token_ids}) check(*tokens);
    changes.allowed = allowed;
    changes.forbidden = forbidden;
    for (const auto& [token, amount] : bias) changes.bias.emplace_back(check(token), static_cast<float>(amount));
    changes.repetition = static_cast<float>(std::get<0>(penalties));
    changes.presence = static_cast<float>(std::get<1>(penalties));
    changes.frequency = static_cast<float>(std::get<2>(penalties));
    changes.prompt = prompt;
    for (const auto& [token, times] : output) changes.output.emplace_back(check(token), static_cast<float>(times));
    changes.token_ids = token_ids;
    changes.ngram_size = ngram_size;
    if (mask) {
      const auto* bytes = reinterpret_cast<const uint8_t*>(mask->c_str());
      changes.mask.emplace(bytes, bytes + mask->size());
    }
    return changes;
  }

  int32_t check(int32_t token) const {
    if (token < 0 || static_cast<std::size_t>(token) >= vocab_) {
      throw nb::index_error("sample: a token id outside the vocabulary");
    }
    return token;
  }
  void check(const std::vector<int32_t>& tokens) const {
    for (const int32_t token : tokens) check(token);
  }

  std::size_t rows_, vocab_;
};

using PyLogprob = std::tuple<int32_t, double, std::size_t>;  // token, log-probability, rank

std::vector<PyLogprob> given(const std::vector<TokenLogprob>& logprobs) {
  std::vector<PyLogprob> all;
  for (const TokenLogprob& one : logprobs) all.emplace_back(one.token, one.logprob, one.rank);
  return all;
}

nb::object given(const RowAnswer& answer) {
  if (answer.failure == RowAnswer::Failure::Damaged) return nb::float_(answer.greatest);
  if (answer.failure == RowAnswer::Failure::NothingLeft) return nb::none();
  std::vector<std::vector<PyLogprob>> tops;
  for (const std::vector<TokenLogprob>& top : answer.tops) tops.push_back(given(top));
  return nb::cast(std::make_tuple(answer.tokens, answer.values, given(answer.logprobs), tops));
}

nb::list sample_rows(Machine& machine, const Logits& logits, const std::vector<PyRequest>& asked) {
  const std::size_t vocab = logits.shape(1);
  if (vocab == 0) throw nb::value_error("a row of logits has at least one value");
  const RequestReader reader(logits.shape(0), vocab);
  std::vector<RowRequest> requests;
  requests.reserve(asked.size());
  for (const PyRequest& request : asked) requests.push_back(reader.read(request));
  std::vector<RowAnswer> answers;
  {
    nb::gil_scoped_release release;
    Pool::Session session(machine.pool);
    machine.run("sample", [&] { answers = sample(machine.kernels, machine.pool, logits.data(), vocab, requests); });
  }
  nb::list all;
  for (const RowAnswer& answer : answers) all.append(given(answer));
  return all;
}

void profile(Machine& machine, bool on) {
  nb::gil_scoped_release release;
  Pool::Session session(machine.pool);
  machine.pool.measure(on);
  machine.profiling = on;
  machine.op_times.clear();
}

std::vector<std::tuple<std::string, double, double>> take_op_times(Machine& machine) {
  std::vector<OpTime> taken;
  {
    nb::gil_scoped_release release;
    Pool::Session session(machine.pool);
    taken.swap(machine.op_times);
  }
  const auto seconds = [](std::chrono::nanoseconds time) { return std::chrono::duration<double>(time).count(); };
  std::vector<std::tuple<std::string, double, double>> all;
  for (const OpTime& one : taken) all.emplace_back(one.op, seconds(one.taken), seconds(one.busy));
  return all;
}

void copy_block(const KVLayer& layer, std::size_t source, std::size_t target) {
  if (source >= layer.num_blocks || target >= layer.num_blocks) throw nb::index_error("copy_block: no such block");
  nb::gil_scoped_release release;
  const std::size_t k = layer.k_block_bytes();
  const std::size_t v = layer.v_block_bytes();
  std::memcpy(layer.k.data() + target * k, layer.k.data() + source * k, k);
  std::memcpy(layer.v.data() + target * v, layer.v.data() + source * v, v);
}

nb::bytes read_block(const KVLayer& layer, std::size_t block) {
  if (block >= layer.num_blocks) throw nb::index_error("read_block: no such block");
  const std::size_t k = layer.k_block_bytes();
  const std::size_t v = layer.v_block_bytes();
  std::string both;
  {
    nb::gil_scoped_release release;
    both.reserve(k + v);
    both.append(reinterpret_cast<const char*>(layer.k.data()) + block * k, k);
    both.append(reinterpret_cast<const char*>(layer.v.data()) + block * v, v);
  }
  return nb::bytes(both.data(), both.size());
}

void write_block(const KVLayer& layer, std::size_t block, const nb::bytes& kv) {
  const std::size_t k = layer.k_block_bytes();
  const std::size_t v = layer.v_block_bytes();
  if (block >= layer.num_blocks) throw nb::index_error("write_block: no such block");
  if (kv.size() != k + v) throw nb::value_error("write_block: not a block of this layer");
  const char* from = kv.c_str();
  nb::gil_scoped_release release;
  std::memcpy(layer.k.data() + block * k, from, k);
  std::memcpy(layer.v.data() + block * v, from + k, v);
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> found;
#if defined(OCTAVO_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  if (avx2 && avx512) found.push_back("avx512");
  if (avx2 && __builtin_cpu_supports("avxvnni")) found.push_back("avxvnni");
  if (avx2) found.push_back("avx2");
#endif
  found.push_back("portable");
  return found;
}

const Kernels& kernels_of(const std::string& name) {
  for (const std::string& found : instruction_sets()) {
    if (found != name) continue;
#if defined(OCTAVO_X86)
    if (name == "avx512") return avx512_kernels();
    if (name == "avxvnni") return avxvnni_kernels();
    if (name == "avx2") return avx2_kernels();
#endif
    return portable_kernels();
  }
  throw nb::value_error(("this processor has no " + name).c_str());
}

}  // namespace

NB_MODULE(_C, m) {
  // An LLM that lives until the process ends is no leak to tell users of.
  nb::set_leak_warnings(false);
  m.doc() = "C++ kernels of the cpu backend.";
  m.def("instruction_sets", &instruction_sets, "Those of this processor that there are kernels for, best first.");
  m.def(
      "panel_bytes",
      [](const std::string& format, std::size_t inputs) { return panel_bytes(format_of(format), inputs); },
      nb::arg("format"), nb::arg("inputs"), "Bytes of 16 packed outputs.");
  nb::class_<Machine>(m, "Machine", "Kernels of one instruction set and a pool of threads.")
      .def(
          "__init__",
          [](Machine* self, const std::string& name, int threads, bool share_prefixes, bool pin) {
            new (self) Machine(kernels_of(name), threads, share_prefixes, pin);
          },
          nb::arg("instruction_set"), nb::arg("threads"), nb::arg("share_prefixes") = true, nb::arg("pin") = false)
      .def("profile", &profile, nb::arg("on"), "Whether to note how long each op takes; what was noted is forgotten.")
      .def("take_op_times", &take_op_times,
           "(op, seconds, seconds that all threads together worked on it) of what ran since the last call, in order.")
      .def_rw("state_bytes", &Machine::state_bytes,
              "Most bytes for the states of tiles that rows of several sequences share; changes no result.")
      .def_prop_ro(
          "shared_tiles", [](const Machine& machine) { return machine.shared_tiles.load(); },
          "Tiles of K and V, of one KV head, that rows of several sequences have read together so far.")
      .def_prop_ro("instruction_set", [](const Machine& machine) { return machine.kernels.name; })
      .def_prop_ro("threads", [](const Machine& machine) { return machine.pool.threads(); });
  m.def(
      "sample", &sample_rows, nb::arg("machine"), nb::arg("logits").noconvert(), nb::arg("requests"),
      "Answers of all requests, in order: (tokens, values, log-probabilities, best tokens of each or of all); None if "
      "nothing is left to draw, the row's greatest value if it is not finite.");
  nb::class_<Weight>(m, "Weight", "Packed matrices [outputs, inputs] that share their input, side by side.")
      .def(
          "__init__",
          [](Weight* self, const std::vector<std::pair<std::string, std::size_t>>& parts, std::size_t inputs,
             const std::optional<Floats>& bias) {
            std::vector<std::pair<Format, std::size_t>> checked;
            for (const auto& [format, outputs] : parts) checked.emplace_back(format_of(format), outputs);
            new (self) Weight(checked, inputs, bias ? vector_of(*bias) : std::vector<float>{});
          },
          nb::arg("parts"), nb::arg("inputs"), nb::arg("bias").none() = nb::none(),
          "`parts`: (format, outputs) of each; `bias`: of all outputs, to be added to each row of the result.")
      .def("release", &Weight::release, "As if it had never been packed.")
      .def("unpack", &unpack, nb::arg("part"), nb::arg("first"), nb::arg("out").noconvert(),
           "The values of a part's outputs from `first` on, into float32 [n, inputs].")
      .def_prop_ro("inputs", [](const Weight& weight) { return weight.inputs; })
      .def_prop_ro("outputs", [](const Weight& weight) { return weight.outputs; })
      .def_prop_ro("nbytes", &Weight::nbytes);
  m.def(
      "write_weights",
      [](const std::vector<std::shared_ptr<Weight>>& weights, int fd, uint64_t offset, const Flag& stop) {
        check_packed(weights, true);
        if (stop.shape(0) == 0) throw nb::value_error("write_weights: no flag");
        return os_errors([&] { return write_weights(weights, fd, offset, stop.data()); });
      },
      nb::arg("weights"), nb::arg("fd"), nb::arg("offset"), nb::arg("stop").noconvert(),
      "Packed weights to a file, from an offset on; their checksum. Raises OSError, once stop[0] is not 0 as well.");
  m.def(
      "read_weights",
      [](const std::vector<std::shared_ptr<Weight>>& weights, int fd, uint64_t offset) {
        check_packed(weights, false);
        return os_errors([&] { return read_weights(weights, fd, offset); });
      },
      nb::arg("weights"), nb::arg("fd"), nb::arg("offset"),
      "What write_weights wrote, instead of packing; the checksum of what was read. Raises OSError.");
  m.def("pack", &pack, nb::arg("machine"), nb::arg("all").noconvert(),
        "Pack rows as files have them: (weight, part, uint8 rows [n, bytes], output of the part that they begin at) of "
        "each.");
  nb::class_<KVLayer>(m, "KVLayer", "K and V of one layer, all blocks.")
      .def(
          "__init__",
          [](KVLayer* self, const std::string& type, std::size_t blocks, std::size_t block_size, std::size_t kv_heads,
             std::size_t head_dim,
             long window) { new (self) KVLayer(kv_type_of(type), blocks, block_size, kv_heads, head_dim, window); },
          nb::arg("type"), nb::arg("num_blocks"), nb::arg("block_size"), nb::arg("kv_heads"), nb::arg("head_dim"),
          nb::arg("window"))
      .def("copy_block", &copy_block, nb::arg("source"), nb::arg("target"))
      .def("copy_slot", &KVLayer::copy_slot, nb::arg("source"), nb::arg("target"), "K and V of one token.")
      .def("read_block", &read_block, nb::arg("block"), "K and V of a block.")
      .def("write_block", &write_block, nb::arg("block"), nb::arg("kv"), "What `read_block` gave.")
      .def_prop_ro(
          "block_bytes", [](const KVLayer& layer) { return layer.k_block_bytes() + layer.v_block_bytes(); },
          "Of K and V.")
      .def_prop_ro("nbytes", [](const KVLayer& layer) { return layer.k.size() + layer.v.size(); });
  nb::class_<Batch>(m, "Batch", "A step's metadata, copied and checked; see octavo.ops.Batch.")
      .def(
          "__init__",
          [](Batch* self, const Ints& input_ids, const Ints& positions, const Ints& query_start_loc,
             const IntTable& block_tables, const Ints& slot_mapping, std::size_t block_size,
             const std::optional<Ints>& tree_starts, const std::optional<Ints>& tree_parents) {
            BatchArrays arrays{copy_of(input_ids),
                               copy_of(positions),
                               copy_of(query_start_loc),
                               copy_of(block_tables),
                               copy_of(slot_mapping),
                               block_tables.shape(1),
                               block_size};
            if (tree_starts) arrays.tree_starts = copy_of(*tree_starts);
            if (tree_parents) arrays.tree_parents = copy_of(*tree_parents);
            new (self) Batch(std::move(arrays));
          },
          nb::arg("input_ids").noconvert(), nb::arg("positions").noconvert(), nb::arg("query_start_loc").noconvert(),
          nb::arg("block_tables").noconvert(), nb::arg("slot_mapping").noconvert(), nb::arg("block_size"),
          nb::arg("tree_starts").noconvert().none(), nb::arg("tree_parents").noconvert().none())
      .def_prop_ro("num_tokens", [](const Batch& batch) { return batch.view().tokens; });
  nb::class_<Graph>(m, "Graph", "Ops on numbered buffers; a view is (buffer, first column, columns).")
      .def(nb::init<std::shared_ptr<Machine>>(), nb::arg("machine"))
      .def("bind", &Graph::bind, nb::arg("columns"))
      .def("embed", &Graph::embed, nb::arg("weight"), nb::arg("scale"))
      .def(
          "rms_norm",
          [](Graph& g, const PyView& x, const Floats& weight, float eps, const std::optional<PyView>& residual) {
            return g.rms_norm(view_of(x), vector_of(weight), eps, view_of(residual));
          },
          nb::arg("x"), nb::arg("weight"), nb::arg("eps"), nb::arg("residual").none())
      .def(
          "linear",
          [](Graph& g, const PyView& x, std::shared_ptr<Weight> weight, const std::optional<PyView>& residual) {
            return g.linear(view_of(x), std::move(weight), view_of(residual));
          },
          nb::arg("x"), nb::arg("weight"), nb::arg("residual").none())
      .def(
          "rope",
          [](Graph& g, const PyView& x, std::size_t head_dim, std::size_t dim, const Floats& inverse_frequencies) {
            return g.rope(view_of(x), head_dim, dim, vector_of(inverse_frequencies));
          },
          nb::arg("x"), nb::arg("head_dim"), nb::arg("dim"), nb::arg("inverse_frequencies"))
      .def(
          "store_kv",
          [](Graph& g, const PyView& k, const PyView& v, std::shared_ptr<KVLayer> layer) {
            g.store_kv(view_of(k), view_of(v), std::move(layer));
          },
          nb::arg("k"), nb::arg("v"), nb::arg("layer"))
      .def(
          "attention",
          [](Graph& g, const PyView& q, std::shared_ptr<KVLayer> layer, float scale) {
            return g.attention(view_of(q), std::move(layer), scale);
          },
          nb::arg("q"), nb::arg("layer"), nb::arg("scale"))
      .def(
          "gated",
          [](Graph& g, const PyView& x, const std::string& activation) {
            if (activation != "silu" && activation != "gelu_tanh") throw nb::value_error("no such activation");
            return g.gated(view_of(x), activation == "silu" ? Gate::Silu : Gate::GeluTanh);
          },
          nb::arg("x"), nb::arg("activation"))
      .def("scratch_bytes", &Graph::scratch_bytes, nb::arg("rows"), nb::arg("seqs"), nb::arg("context"),
           "What a run takes besides weights, KV and bound buffers; draft trees are not counted.")
      // noconvert: another type or layout would be copied, and what is written to a copy is lost.
      .def("run", &run, nb::arg("bound_ids"), nb::arg("bound").noconvert(), nb::arg("batch").none(), nb::arg("rows"),
           nb::arg("taps").noconvert() = nb::tuple(),
           "Run with the memory of bound buffers and, last, of the last op's output. `taps`: (view, rows, out) to "
           "copy.");
  bind_texts(m);
}
