#include "graph.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <stdexcept>
#include <utility>

namespace octavo {

namespace {

constexpr std::size_t kMostValues = std::size_t{1} << 56;  // of one dimension: products by a few bytes do not overflow

// Throws std::bad_alloc where the number of bytes is beyond what a number can hold.
std::size_t times(std::size_t a, std::size_t b) {
  std::size_t result;
  if (__builtin_mul_overflow(a, b, &result)) throw std::bad_alloc();
  return result;
}

}  // namespace

Weight::Weight(const std::vector<std::pair<Format, std::size_t>>& parts, std::size_t inputs,
               const std::vector<float>& bias)
    : inputs(inputs) {
  if (parts.empty() || inputs == 0) throw std::invalid_argument("a weight has at least one output and one input");
  for (const auto& [format, part] : parts) {
    if (part == 0) throw std::invalid_argument("a weight has at least one output");
    if (!is_float(format)) {
      const std::size_t multiple = kGroup * static_cast<std::size_t>(layout_of(format).groups_per_super);
      if (inputs % multiple != 0) throw std::invalid_argument("inputs must be a multiple of the format's block");
    }
    if (inputs > kMostValues || part > kMostValues) throw std::bad_alloc();
    segments.push_back({format, outputs, part, times(panels_of(part), panel_bytes(format, inputs))});
    outputs += part;
  }
  if (bias.empty()) return;
  if (bias.size() != outputs) throw std::invalid_argument("a bias has a number for each output");
  for (Segment& segment : segments) {
    const auto begin = bias.begin() + static_cast<std::ptrdiff_t>(segment.first);
    segment.bias.assign(begin, begin + static_cast<std::ptrdiff_t>(segment.outputs));
    segment.bias.resize(panels_of(segment.outputs) * kPanel);
  }
}

void Weight::allocate() {
  const std::lock_guard<std::mutex> guard(mutex_);
  if (allocated_) return;
  for (Segment& segment : segments) segment.packed = Bytes(segment.packed_bytes, Bytes::Kind::kPacked);
  allocated_ = true;
}

void Weight::release() {
  const std::lock_guard<std::mutex> guard(mutex_);
  for (Segment& segment : segments) segment.packed = {};
  allocated_ = false;
}

bool Weight::any_codes() const {
  return std::any_of(segments.begin(), segments.end(), [](const Segment& s) { return !is_float(s.format); });
}

bool Weight::any_floats() const {
  return std::any_of(segments.begin(), segments.end(), [](const Segment& s) { return is_float(s.format); });
}

std::size_t Weight::nbytes() const {
  std::size_t sum = 0;
  for (const Segment& segment : segments) sum += segment.packed_bytes;
  return sum;
}

KVLayer::KVLayer(KVType type, std::size_t blocks, std::size_t block_size, std::size_t kv_heads, std::size_t head_dim,
                 long window)
    : view{type, nullptr, nullptr, kv_heads, head_dim, block_size}, window(window), num_blocks(blocks) {
  if (block_size % 16 != 0 || block_size == 0 || block_size > kTile || kTile % block_size != 0) {
    throw std::invalid_argument("block_size must be 16, 32 or 64");
  }
  if (head_dim % 16 != 0 || head_dim == 0 || head_dim > kMostHeadDim) {
    throw std::invalid_argument("head_dim must be a multiple of 16 and at most 1024");
  }
  if (kv_heads == 0) throw std::invalid_argument("kv_heads must be at least 1");
  if (window < 0) throw std::invalid_argument("window must be at least 1, or 0 for none");
  if (kv_heads > kMostValues / (block_size * head_dim)) throw std::bad_alloc();
  k = Bytes(times(num_blocks, k_block_bytes()), Bytes::Kind::kLazy);
  v = Bytes(times(num_blocks, v_block_bytes()), Bytes::Kind::kLazy);
  view.k = k.data();
  view.v = v.data();
}

void KVLayer::copy_slot(std::size_t source, std::size_t target) {
  const std::size_t size = view.block_size;
  if (source / size >= num_blocks || target / size >= num_blocks) throw std::out_of_range("copy_slot: no such slot");
  const std::size_t from = source % size;
  const std::size_t to = target % size;
  const std::size_t value = view.type == KVType::F32 ? 4 : 2;
  for (std::size_t head = 0; head < view.kv_heads; ++head) {
    const uint8_t* k_from = view.k + (source / size * view.kv_heads + head) * view.k_head_bytes();
    const uint8_t* v_from = view.v + (source / size * view.kv_heads + head) * view.v_head_bytes();
    uint8_t* k_to = view.k + (target / size * view.kv_heads + head) * view.k_head_bytes();
    uint8_t* v_to = view.v + (target / size * view.kv_heads + head) * view.v_head_bytes();
    if (view.type != KVType::I8) {
      for (std::size_t d = 0; d < view.head_dim; ++d) {
        std::memmove(k_to + (d * size + to) * value, k_from + (d * size + from) * value, value);
      }
      std::memmove(v_to + to * view.head_dim * value, v_from + from * view.head_dim * value, view.head_dim * value);
      continue;
    }
    for (std::size_t d = 0; d < view.head_dim; ++d) {
      k_to[view.k_code_at(d, to)] = k_from[view.k_code_at(d, from)];
      v_to[view.v_code_at(d, to)] = v_from[view.v_code_at(d, from)];
    }
    for (std::size_t d = 0; d < view.head_dim; d += KVView::kScaled) {
      std::memmove(k_to + view.k_scale_at(d, to), k_from + view.k_scale_at(d, from), sizeof(float));
    }
    std::memmove(v_to + view.v_scale_at(to), v_from + view.v_scale_at(from), sizeof(float));
  }
}

// --- recording ---

std::unique_lock<std::mutex> Graph::recording() {
  std::unique_lock<std::mutex> lock(in_use_, std::try_to_lock);
  if (!lock) throw std::runtime_error("a graph that runs cannot be recorded on");
  return lock;
}

int Graph::bind(std::size_t columns) {
  const auto lock = recording();
  buffers_.push_back({columns, num_bound_++, -1, 0});
  return static_cast<int>(buffers_.size()) - 1;
}

void Graph::check(const View& view) const {
  if (view.buffer < 0 || static_cast<std::size_t>(view.buffer) >= buffers_.size()) {
    throw std::invalid_argument("a view of no buffer");
  }
  const std::size_t columns = buffers_[static_cast<std::size_t>(view.buffer)].columns;
  if (view.columns == 0) throw std::invalid_argument("a view of no columns");
  if (view.first > columns || view.columns > columns - view.first) {
    throw std::invalid_argument("a view reaches past its buffer");
  }
}

int Graph::add(Node node, std::size_t columns) {
  if (node.op != Op::Embed) check(node.x);
  if (node.op == Op::StoreKV || node.residual.buffer >= 0) check(node.residual);
  for (const View& view : {node.x, node.residual}) {
    if (view.buffer >= 0) buffers_[static_cast<std::size_t>(view.buffer)].last_use = static_cast<int>(nodes_.size());
  }
  if (columns > 0) {
    buffers_.push_back({columns, -1, static_cast<int>(nodes_.size()), 0});
    node.out = static_cast<int>(buffers_.size()) - 1;
  }
  nodes_.push_back(std::move(node));
  planned_ = all_packed_ = false;
  return nodes_.back().out;
}

int Graph::embed(std::shared_ptr<Weight> weight, float scale) {
  const auto lock = recording();
  if (weight == nullptr) throw std::invalid_argument("no weight");
  if (weight->segments.size() != 1) throw std::invalid_argument("embed: the weight must be of one part");
  embed_rows_ = std::min(embed_rows_, weight->outputs);
  const std::size_t columns = weight->inputs;
  return add({.op = Op::Embed, .weight = std::move(weight), .number = scale}, columns);
}

int Graph::rms_norm(View x, std::vector<float> weight, float eps, View residual) {
  const auto lock = recording();
  if (weight.empty() || x.columns % weight.size() != 0)
    throw std::invalid_argument("rms_norm: the weight does not fit x");
  if (residual.buffer >= 0 && residual.columns != x.columns)
    throw std::invalid_argument("rms_norm: the residual does not fit x");
  return add({.op = Op::RmsNorm, .x = x, .residual = residual, .vector = std::move(weight), .number = eps}, x.columns);
}

int Graph::linear(View x, std::shared_ptr<Weight> weight, View residual) {
  const auto lock = recording();
  if (weight == nullptr) throw std::invalid_argument("no weight");
  if (x.columns != weight->inputs) throw std::invalid_argument("linear: x does not have the weight's number of inputs");
  if (residual.buffer >= 0 && residual.columns != weight->outputs) {
    throw std::invalid_argument("linear: the residual does not have the weight's number of outputs");
  }
  check(x);
  if (weight->any_floats() && columns_of(x.buffer) != weight->inputs) {
    throw std::invalid_argument("linear: float weights need x without gaps");
  }
  if (residual.buffer >= 0) {
    check(residual);
    if (columns_of(residual.buffer) != weight->outputs) throw std::invalid_argument("linear: the residual has gaps");
  }
  if (weight->any_codes()) quantized_inputs_ = std::max(quantized_inputs_, weight->inputs);
  const std::size_t columns = weight->outputs;
  return add({.op = Op::Linear, .x = x, .residual = residual, .weight = std::move(weight)}, columns);
}

int Graph::rope(View x, std::size_t head_dim, std::size_t dim, std::vector<float> inverse_frequencies) {
  const auto lock = recording();
  if (head_dim == 0 || x.columns % head_dim != 0 || dim > head_dim || inverse_frequencies.size() * 2 != dim) {
    throw std::invalid_argument("rope: shapes do not fit");
  }
  auto found = std::find(tables_.begin(), tables_.end(), inverse_frequencies);
  if (found == tables_.end()) found = tables_.insert(tables_.end(), std::move(inverse_frequencies));
  const int table = static_cast<int>(found - tables_.begin());
  return add({.op = Op::Rope, .x = x, .head_dim = head_dim, .dim = dim, .table = table}, x.columns);
}

void Graph::store_kv(View k, View v, std::shared_ptr<KVLayer> layer) {
  const auto lock = recording();
  if (layer == nullptr) throw std::invalid_argument("no layer of KV");
  const std::size_t columns = layer->view.kv_heads * layer->view.head_dim;
  if (k.columns != columns || v.columns != columns)
    throw std::invalid_argument("store_kv: K and V do not fit the layer");
  add({.op = Op::StoreKV, .x = k, .residual = v, .layer = std::move(layer)}, 0);
}

int Graph::attention(View q, std::shared_ptr<KVLayer> layer, float scale) {
  const auto lock = recording();
  if (layer == nullptr) throw std::invalid_argument("no layer of KV");
  const std::size_t per_group = layer->view.kv_heads * layer->view.head_dim;
  if (q.columns % per_group != 0 || q.columns / per_group > 64)
    throw std::invalid_argument("attention: q does not fit the layer");
  return add({.op = Op::Attention, .x = q, .layer = std::move(layer), .number = scale}, q.columns);
}

int Graph::gated(View x, Gate gate) {
  const auto lock = recording();
  if (x.columns % 2 != 0) throw std::invalid_argument("gated: an odd number of columns");
  return add({.op = Op::Gated, .x = x, .gate = gate}, x.columns / 2);
}

std::vector<int> Graph::bound_buffers() const {
  std::vector<int> ids;
  for (std::size_t b = 0; b < buffers_.size(); ++b) {
    if (buffers_[b].bound >= 0) ids.push_back(static_cast<int>(b));
  }
  if (!nodes_.empty() && nodes_.back().out >= 0) ids.push_back(nodes_.back().out);
  return ids;
}

// Throws std::invalid_argument if a batch would make an op read or write where nothing is.
void Graph::check(const Batch* batch, std::size_t rows) const {
  const auto needs = [](bool yes) {
    if (!yes) throw std::invalid_argument("run: the batch does not fit");
  };
  if (batch != nullptr) needs(batch->view().tokens == rows);
  for (const Node& node : nodes_) {
    if (node.op == Op::Embed || node.op == Op::Rope || node.layer != nullptr) needs(batch != nullptr);
    if (node.layer != nullptr) needs(batch->inside(node.layer->num_blocks, node.layer->view.block_size));
  }
  if (embed_rows_ != SIZE_MAX) needs(batch->greatest_id() < static_cast<int64_t>(embed_rows_));
}

void Graph::check(const Tap& tap, std::size_t rows) const {
  check(tap.view);
  if (buffers_[static_cast<std::size_t>(tap.view.buffer)].bound >= 0) {
    throw std::invalid_argument("run: rows are copied of what an op made");
  }
  for (const int32_t row : tap.rows) {
    if (row < 0 || static_cast<std::size_t>(row) >= rows) throw std::invalid_argument("run: no such row");
  }
}

void Graph::plan() {
  plan_memory();
  plan_codes();
  planned_ = true;
}

// Decides who quantises what linear ops multiply: whoever makes a row, where it can, while the row is in its cache. The
// codes of one input have room at a time.
void Graph::plan_codes() {
  std::size_t free = 0;  // the first node behind the last that needs the codes before
  for (Node& node : nodes_) node.quantizes_for = nullptr, node.has_codes = false;
  for (std::size_t n = 0; n < nodes_.size(); ++n) {
    Node& node = nodes_[n];
    if (node.op != Op::Linear || !node.weight->any_codes()) continue;
    const View& x = node.x;
    for (std::size_t p = free; p < n; ++p) {
      Node& made = nodes_[p];
      if (made.out != x.buffer || columns_of(made.out) != x.columns) continue;
      const bool in_rows = made.op == Op::Gated || (made.op == Op::RmsNorm && made.vector.size() == x.columns);
      const bool in_heads = made.op == Op::Attention && x.columns / made.layer->view.kv_heads % kGroup == 0;
      node.has_codes = in_rows || in_heads;
      if (node.has_codes) made.quantizes_for = node.weight.get();
    }
    free = n + 1;
  }
}

// Of as many rows as the graph runs on; what the formats of this weight need.
Quantized Graph::codes_for(const Weight& weight, std::size_t rows) const {
  const std::size_t groups = rows * (weight.inputs / kGroup);
  auto* codes = codes_.as<int8_t>();
  auto* scales = reinterpret_cast<float*>(codes + groups * kGroup);
  auto* minus_sums = reinterpret_cast<int32_t*>(scales + 2 * groups);
  Quantized result{rows, weight.inputs, codes, scales, nullptr, nullptr, nullptr};
  for (const Weight::Segment& segment : weight.segments) {
    if (is_float(segment.format)) continue;
    const Layout layout = layout_of(segment.format);
    if (layout.needs_totals()) result.totals = scales + groups;
    if (layout.needs_sums()) result.minus_sums = minus_sums;
    if (layout.needs_parts()) result.minus_parts = minus_sums + groups;
  }
  return result;
}

// Gives buffers places in the arena; a place is used again once its buffer was read for the last time.
void Graph::plan_memory() {
  struct Place {
    std::size_t at, columns;
  };
  std::vector<Place> free;
  arena_columns_ = 0;
  const int result = nodes_.empty() ? -1 : nodes_.back().out;
  for (std::size_t n = 0; n < nodes_.size(); ++n) {
    const int out = nodes_[n].out;
    if (out >= 0 && out != result) {
      Buffer& buffer = buffers_[static_cast<std::size_t>(out)];
      const auto fits =
          std::find_if(free.begin(), free.end(), [&](const Place& p) { return p.columns == buffer.columns; });
      if (fits != free.end()) {
        buffer.at = fits->at;
        free.erase(fits);
      } else {
        buffer.at = arena_columns_;
        arena_columns_ += buffer.columns;
      }
    }
    for (std::size_t b = 0; b < buffers_.size(); ++b) {
      Buffer& buffer = buffers_[b];
      if (buffer.last_use == static_cast<int>(n) && buffer.bound < 0 && static_cast<int>(b) != result) {
        free.push_back({buffer.at, buffer.columns});
        buffer.last_use = -2;
      }
    }
  }
}

std::size_t Graph::scratch_bytes(std::size_t rows, std::size_t seqs, std::size_t context) {
  const std::unique_lock<std::mutex> lock(in_use_);
  if (!planned_) plan();
  std::size_t columns = arena_columns_ * sizeof(float);
  columns += quantized_inputs_ / kGroup * Quantized::bytes_of_group();
  for (const auto& table : tables_) columns += 2 * table.size() * sizeof(float);
  const std::size_t with_states = std::min(rows, times(seqs, AttentionPlan::kFewRows));
  std::size_t states = 0, scratch = 0;
  for (const Node& node : nodes_) {
    if (node.op != Op::Attention) continue;
    const std::size_t dim = node.layer->view.head_dim;
    const std::size_t group = node.x.columns / dim / node.layer->view.kv_heads;
    const std::size_t seen = node.layer->window == 0 ? context : static_cast<std::size_t>(node.layer->window) + kTile;
    const std::size_t tiles = std::min(context, seen) / kTile + 1;
    const std::size_t of_row = times(tiles, node.layer->view.kv_heads * group * (2 + dim) * sizeof(float));
    states = std::max(states, std::min(times(with_states, of_row), machine_->state_bytes));
    scratch = std::max(scratch, machine_->kernels.attention_scratch(dim, group) * sizeof(float));
  }
  return times(rows, columns) + states + scratch * static_cast<std::size_t>(machine_->pool.threads());
}

// --- running ---

struct Graph::Work {
  const Batch* batch;
  std::size_t rows;
  const std::vector<float*>& bound;
};

namespace {

struct Place {
  float* data;
  std::size_t stride;
};

constexpr const char* kOpNames[] = {"embed", "rms_norm", "linear", "rope", "store_kv", "attention", "gated"};

constexpr std::size_t kGatedPart = 512;   // values
constexpr std::size_t kFewValues = 2048;  // so many are done before another thread has heard of them
constexpr std::size_t kStoring = 4;       // a value of K or V takes as long as so many that are normalised
constexpr std::size_t kReadingRows = 1;   // of more, threads that wait are a hindrance to those that multiply
constexpr std::size_t kRowsAtOnce = 128;  // rows whose activations stay in a core's own cache while panels pass by
// What the others may wait for when a thread has drawn the last piece: a few microseconds.
constexpr std::size_t kLongMultiplication = std::size_t{1} << 20;  // multiplications
constexpr std::size_t kLongRead = 32 << 10;                        // bytes of weights

// Whole tiles, so that no two threads write to the same cache line of codes; of few rows, each of so many values, even
// shares of what is worth a thread.
std::size_t rows_of_piece(std::size_t rows, std::size_t values, int threads) {
  if (rows >= 2 * kRowTile) return kRowTile;
  const std::size_t worth = (rows * values + kFewValues - 1) / kFewValues;
  const std::size_t pieces = std::min({rows, worth, static_cast<std::size_t>(threads)});
  return (rows + pieces - 1) / pieces;
}

// How many panels, each times the rows of a block, are a piece; each is so many multiplications and bytes.
std::size_t panels_of_piece(std::size_t products, std::size_t multiplications, std::size_t bytes, int threads) {
  const std::size_t share = products / (static_cast<std::size_t>(threads) * 8);
  return std::max<std::size_t>(1, std::min({share, kLongMultiplication / multiplications, kLongRead / bytes}));
}

}  // namespace

void Graph::run(const Batch* batch, std::size_t rows, const std::vector<int>& bound_ids,
                const std::vector<float*>& bound, const std::vector<Tap>& taps) {
  const std::unique_lock<std::mutex> lock(in_use_);
  for (const Tap& tap : taps) check(tap, rows);
  if (nodes_.empty() || rows == 0) return;
  if (bound_ids != bound_buffers()) throw std::invalid_argument("run: more was recorded meanwhile");
  check(batch, rows);
  Pool::Session session(machine_->pool);
  if (!all_packed_) {
    for (const Node& node : nodes_) {
      if (node.weight != nullptr && !node.weight->allocated()) {
        throw std::invalid_argument("run: a weight was never packed");
      }
    }
    list_weights();
    all_packed_ = true;
  }
  if (!planned_) plan();
  const bool reads = rows <= kReadingRows && !weights_->ranges.empty();
  if (reads) machine_->pool.ahead().begin(weights_);
  std::size_t linears = 0;
  arena_.grow(arena_columns_ * rows * sizeof(float));
  codes_.grow(quantized_inputs_ / kGroup * rows * Quantized::bytes_of_group());
  const int32_t* positions = batch == nullptr ? nullptr : batch->view().positions;  // no rope without a batch
  std::size_t angles = 0;
  for (const auto& table : tables_) angles += 2 * table.size() * rows;
  angles_.grow(angles * sizeof(float));
  float* at = angles_.as<float>();
  for (const auto& table : tables_) {
    machine_->run("angles", [&] { fill_angles(table, positions, rows, at); });
    at += 2 * table.size() * rows;
  }
  Work work{batch, rows, bound};
  for (const Node& node : nodes_) {
    if (reads && node.op == Op::Linear) machine_->pool.ahead().pass(linears++);
    machine_->run(kOpNames[static_cast<std::size_t>(node.op)], [&] { run_node(node, work); });
    for (const Tap& tap : taps) {
      if (tap.view.buffer == node.out) copy_out(tap, work);  // before its memory serves another op
    }
  }
}

void Graph::list_weights() {
  weights_->ranges.clear();
  for (const Node& node : nodes_) {
    if (node.op != Op::Linear) continue;
    const Weight::Segment& segment = node.weight->segments.front();  // of several, the first is as a rule the largest
    weights_->ranges.push_back({segment.packed.data(), segment.packed_bytes});
  }
}

// Cosines and sines of each row: [rows, 2, half a head].
void Graph::fill_angles(const std::vector<float>& table, const int32_t* positions, std::size_t rows, float* angles) {
  const std::size_t half = table.size();
  machine_->pool.parallel(rows, 16, [&](std::size_t begin, std::size_t end) {
    for (std::size_t t = begin; t < end; ++t) {
      for (std::size_t i = 0; i < half; ++i) {
        const float angle = static_cast<float>(positions[t]) * table[i];
        angles[2 * half * t + i] = static_cast<float>(std::cos(static_cast<double>(angle)));
        angles[2 * half * t + half + i] = static_cast<float>(std::sin(static_cast<double>(angle)));
      }
    }
  });
}

float* Graph::memory_of(int index, const Work& work) const {
  const Buffer& buffer = buffers_[static_cast<std::size_t>(index)];
  return index == nodes_.back().out ? work.bound.back()
         : buffer.bound >= 0        ? work.bound[static_cast<std::size_t>(buffer.bound)]
                                    : arena_.as<float>() + buffer.at * work.rows;
}

void Graph::copy_out(const Tap& tap, const Work& work) const {
  const float* from = memory_of(tap.view.buffer, work) + tap.view.first;
  const std::size_t stride = columns_of(tap.view.buffer);
  float* to = tap.out;
  for (const int32_t row : tap.rows) {
    std::memcpy(to, from + static_cast<std::size_t>(row) * stride, tap.view.columns * sizeof(float));
    to += tap.view.columns;
  }
}

void Graph::run_node(const Node& node, Work& work) {
  const Kernels& kernels = machine_->kernels;
  Pool& pool = machine_->pool;
  const std::size_t rows = work.rows;
  const auto place = [&](const View& view) -> Place {
    if (view.buffer < 0) return {nullptr, 0};
    return {memory_of(view.buffer, work) + view.first, columns_of(view.buffer)};
  };
  const Place x = place(node.x);
  const Place residual = place(node.residual);
  const Place y = place({node.out, 0, 0});
  const Quantized to = node.quantizes_for == nullptr ? Quantized{} : codes_for(*node.quantizes_for, rows);
  const auto quantize = [&](std::size_t t, std::size_t first, std::size_t last) {  // columns of row t of the output
    kernels.quantize(y.data + t * y.stride + first, t, first / kGroup, last / kGroup, to);
  };
  switch (node.op) {
    case Op::Embed:
      pool.parallel(rows, 8, [&](std::size_t begin, std::size_t end) {
        for (std::size_t t = begin; t < end; ++t) {
          kernels.embed(node.weight->segments[0].format, node.weight->segments[0].packed.data(), node.weight->inputs,
                        static_cast<std::size_t>(work.batch->view().input_ids[t]), node.number, y.data + t * y.stride);
        }
      });
      return;
    case Op::RmsNorm: {
      const std::size_t n = node.vector.size();
      const std::size_t heads = node.x.columns / n;
      pool.parallel(rows, rows_of_piece(rows, node.x.columns, pool.threads()), [&](std::size_t begin, std::size_t end) {
        for (std::size_t t = begin; t < end; ++t) {
          for (std::size_t h = 0; h < heads; ++h) {
            const float* r = residual.data == nullptr ? nullptr : residual.data + t * residual.stride + h * n;
            kernels.rms_norm(x.data + t * x.stride + h * n, node.vector.data(), r, n, node.number,
                             y.data + t * y.stride + h * n);
          }
          if (node.quantizes_for != nullptr) quantize(t, 0, y.stride);
        }
      });
      return;
    }
    case Op::Rope: {
      const float* angles = angles_.as<float>();
      for (int i = 0; i < node.table; ++i) angles += 2 * tables_[static_cast<std::size_t>(i)].size() * rows;
      pool.parallel(rows, rows_of_piece(rows, node.x.columns, pool.threads()), [&](std::size_t begin, std::size_t end) {
        for (std::size_t t = begin; t < end; ++t) {
          const float* angle = angles + node.dim * t;
          for (std::size_t c = 0; c < node.x.columns; c += node.head_dim) {
            kernels.rope(x.data + t * x.stride + c, angle, angle + node.dim / 2, node.dim, node.head_dim,
                         y.data + t * y.stride + c);
          }
        }
      });
      return;
    }
    case Op::StoreKV: {
      const KVView& kv = node.layer->view;
      const std::size_t grain = rows_of_piece(rows, kStoring * node.x.columns, pool.threads());
      pool.parallel(rows, grain, [&](std::size_t begin, std::size_t end) {
        for (std::size_t t = begin; t < end; ++t) {
          for (std::size_t h = 0; h < kv.kv_heads; ++h) {
            kernels.store_kv(kv, x.data + t * x.stride + h * kv.head_dim,
                             residual.data + t * residual.stride + h * kv.head_dim, h,
                             work.batch->view().slot_mapping[t]);
          }
        }
      });
      return;
    }
    case Op::Gated: {
      const std::size_t n = node.x.columns / 2;
      // Rows are cut into parts, so that a few of them are work for several threads.
      const std::size_t parts = (n + kGatedPart - 1) / kGatedPart;
      const std::size_t grain = rows < 2 * kRowTile ? kFewValues / kGatedPart : kRowTile * parts;
      pool.parallel(rows * parts, grain, [&](std::size_t begin, std::size_t end) {
        for (std::size_t i = begin; i < end; ++i) {
          const std::size_t t = i / parts;
          const std::size_t first = i % parts * kGatedPart;
          const std::size_t last = std::min(first + kGatedPart, n);
          const float* gate = x.data + t * x.stride + first;
          kernels.gated(gate, gate + n, last - first, node.gate, y.data + t * y.stride + first);
          if (node.quantizes_for != nullptr) quantize(t, first, last);
        }
      });
      return;
    }
    case Op::Linear:
      return run_linear(node, work);
    case Op::Attention:
      return run_attention(node, work);
  }
}

void Graph::run_linear(const Node& node, Work& work) {
  const Kernels& kernels = machine_->kernels;
  Pool& pool = machine_->pool;
  const std::size_t rows = work.rows;
  const Weight& weight = *node.weight;
  const float* x = memory_of(node.x.buffer, work) + node.x.first;
  const std::size_t x_stride = buffers_[static_cast<std::size_t>(node.x.buffer)].columns;
  const Quantized codes = codes_for(weight, rows);
  if (weight.any_codes() && !node.has_codes) {
    pool.parallel(rows, rows_of_piece(rows, weight.inputs, pool.threads()), [&](std::size_t begin, std::size_t end) {
      for (std::size_t t = begin; t < end; ++t) {
        kernels.quantize(x + t * x_stride, t, 0, weight.inputs / kGroup, codes);
      }
    });
  }
  const float* residual =
      node.residual.buffer < 0 ? nullptr : memory_of(node.residual.buffer, work) + node.residual.first;
  float* y = memory_of(node.out, work);
  std::size_t panels = 0;
  for (const Weight::Segment& segment : weight.segments) panels += panels_of(segment.outputs);
  const std::size_t blocks = (rows + kRowsAtOnce - 1) / kRowsAtOnce;
  const std::size_t multiplications = std::min(rows, kRowsAtOnce) * weight.inputs * kPanel;
  const std::size_t grain = panels_of_piece(blocks * panels, multiplications, weight.nbytes() / panels, pool.threads());
  // Panels [begin, end) of all segments, by one block of rows.
  const auto multiply = [&](std::size_t block, std::size_t begin, std::size_t end) {
    const std::size_t first_row = block * kRowsAtOnce;
    const std::size_t last_row = std::min(first_row + kRowsAtOnce, rows);
    std::size_t first = 0;  // panel of the segment
    for (const Weight::Segment& segment : weight.segments) {
      const std::size_t last = first + panels_of(segment.outputs);
      if (begin < last && end > first) {
        kernels.linear({segment.format, segment.packed.data(), segment.outputs, weight.inputs,
                        std::max(begin, first) - first, std::min(end, last) - first, first_row, last_row, x, codes,
                        segment.bias.empty() ? nullptr : segment.bias.data(),
                        residual == nullptr ? nullptr : residual + segment.first, y + segment.first, weight.outputs});
      }
      first = last;
    }
  };
  // All segments in one region: a region costs as much as reading some 30 kB.
  pool.parallel(blocks * panels, grain, [&](std::size_t begin, std::size_t end) {
    while (begin < end) {
      const std::size_t block = begin / panels;
      const std::size_t stop = std::min(end, (block + 1) * panels);
      multiply(block, begin - block * panels, stop - block * panels);
      begin = stop;
    }
  });
}

void Graph::run_attention(const Node& node, Work& work) {
  const Kernels& kernels = machine_->kernels;
  Pool& pool = machine_->pool;
  const KVLayer& layer = *node.layer;
  const BatchView& batch = work.batch->view();
  const std::size_t dim = layer.view.head_dim;
  const std::size_t heads = node.x.columns / dim;
  const std::size_t group = heads / layer.view.kv_heads;
  const KVView& kv = layer.view;
  const std::size_t state_size = group * (2 + dim);
  const AttentionPlan& plan =
      work.batch->plan(static_cast<std::size_t>(layer.window), kv.kv_heads, pool.threads(), machine_->share_prefixes,
                       machine_->state_bytes / (state_size * sizeof(float)));
  machine_->shared_tiles += plan.shared_tiles;
  states_.grow(plan.num_states * state_size * sizeof(float));
  const std::size_t scratch = (kernels.attention_scratch(dim, group) + 15) / 16 * 16;
  const std::size_t pieces = plan.items.size();
  const std::size_t grain = std::max<std::size_t>(1, pieces / (static_cast<std::size_t>(pool.threads()) * 16));
  scratch_.grow(scratch * static_cast<std::size_t>(pool.threads()) * sizeof(float));
  const float* q = memory_of(node.x.buffer, work) + node.x.first;
  const std::size_t q_stride = buffers_[static_cast<std::size_t>(node.x.buffer)].columns;
  float* out = memory_of(node.out, work);
  const Quantized codes = node.quantizes_for == nullptr ? Quantized{} : codes_for(*node.quantizes_for, work.rows);
  const auto quantize = [&](std::size_t row, std::size_t kv_head) {
    const std::size_t first = kv_head * group * dim;
    kernels.quantize(out + row * heads * dim + first, row, first / kGroup, (first + group * dim) / kGroup, codes);
  };
  pool.parallel(pieces, grain, [&](std::size_t begin, std::size_t end, std::size_t thread) {
    for (std::size_t i = begin; i < end; ++i) {
      const AttentionPlan::Item& item = plan.items[i];
      const AttentionPiece piece{kv,
                                 q,
                                 q_stride,
                                 heads,
                                 node.number,
                                 layer.window,
                                 batch.positions,
                                 batch.block_tables + item.seq * batch.table_width,
                                 plan.rows.data() + item.first,
                                 item.count,
                                 item.kv_head,
                                 out,
                                 item.first_tile,
                                 item.last_tile,
                                 item.folds,
                                 states_.as<float>(),
                                 plan.states.data() + item.first,
                                 plan.tails.data() + item.tail,
                                 item.tail_start};
      kernels.attention(piece, scratch_.as<float>() + thread * scratch);
      if (node.quantizes_for == nullptr || item.last_tile != 0) continue;  // the latter are folded below
      for (std::size_t r = 0; r < item.count; ++r) quantize(static_cast<std::size_t>(piece.rows[r]), item.kv_head);
    }
  });
  if (!plan.folds.empty()) {
    pool.parallel(plan.folds.size(), 4, [&](std::size_t begin, std::size_t end) {
      for (std::size_t i = begin; i < end; ++i) {
        const AttentionPlan::Fold& fold = plan.folds[i];
        kernels.fold(states_.as<float>() + fold.state * state_size, fold.states, group, dim,
                     out + fold.row * heads * dim + fold.kv_head * group * dim);
        if (node.quantizes_for != nullptr) quantize(fold.row, fold.kv_head);
      }
    });
  }
}

}  // namespace octavo
