// A step of a model as a list of ops on numbered buffers, recorded once and run with each batch's metadata.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "batch.h"
#include "kernels.h"
#include "memory.h"
#include "pool.h"

namespace octavo {

// Matrices that share their input, side by side: one segment each. They have no memory before `allocate`: a model can
// be looked at before there is room for it.
struct Weight {
  struct Segment {
    Format format;
    std::size_t first, outputs;  // columns of the result
    std::size_t packed_bytes;
    Bytes packed = {};
    std::vector<float> bias = {};  // of whole panels, to be added to each row of the result; empty: none
  };
  std::size_t outputs = 0, inputs;
  std::vector<Segment> segments;

  // `bias`: [outputs], or empty. Throws std::invalid_argument.
  Weight(const std::vector<std::pair<Format, std::size_t>>& parts, std::size_t inputs,
         const std::vector<float>& bias = {});
  Weight(const Weight&) = delete;
  void allocate();  // zeros, once. Throws std::bad_alloc
  void release();   // as if it had never been allocated
  bool allocated() const { return allocated_; }
  bool any_codes() const;  // integer formats, which take quantised activations
  bool any_floats() const;
  std::size_t nbytes() const;

 private:
  std::mutex mutex_;
  std::atomic<bool> allocated_{false};
};

struct KVLayer {
  KVView view;
  long window;  // 0: none
  std::size_t num_blocks;
  Bytes k, v;

  KVLayer(KVType type, std::size_t num_blocks, std::size_t block_size, std::size_t kv_heads, std::size_t head_dim,
          long window);
  std::size_t k_block_bytes() const { return view.kv_heads * view.k_head_bytes(); }
  std::size_t v_block_bytes() const { return view.kv_heads * view.v_head_bytes(); }
  // K and V of one token, to another place.
  void copy_slot(std::size_t source, std::size_t target);
};

// How long an op took, and how long all threads together worked on it.
struct OpTime {
  const char* op;
  std::chrono::nanoseconds taken, busy;
};

struct Machine {
  const Kernels& kernels;
  const bool share_prefixes;  // whether rows of several sequences read the blocks they share together
  Pool pool;
  std::size_t state_bytes = std::size_t{64} << 20;  // most that the states of tiles take, besides draft trees'
  std::atomic<uint64_t> shared_tiles{0};            // tiles of K and V, of one KV head, that were read so

  // What follows is for who holds a session of the pool.
  bool profiling = false;
  std::vector<OpTime> op_times;  // of what ran while profiling

  // Runs an op, and notes how long it took if that is wanted.
  template <class Body>
  void run(const char* op, const Body& body) {
    if (!profiling) return body();
    pool.take_busy();
    const auto started = std::chrono::steady_clock::now();
    body();
    op_times.push_back({op, std::chrono::steady_clock::now() - started, pool.take_busy()});
  }

  Machine(const Kernels& kernels, int threads, bool share_prefixes, bool pin)
      : kernels(kernels), share_prefixes(share_prefixes), pool(threads, pin) {}
};

// Some columns of a buffer.
struct View {
  int buffer = -1;
  std::size_t first = 0;
  std::size_t columns = 0;
};

// Rows of a view that are copied out while a graph runs.
struct Tap {
  View view;
  std::vector<int32_t> rows;
  float* out;  // [rows, columns of the view]
};

class Graph {
 public:
  explicit Graph(std::shared_ptr<Machine> machine) : machine_(std::move(machine)) {}

  // A buffer [rows, columns] whose memory the caller of `run` gives.
  int bind(std::size_t columns);

  int embed(std::shared_ptr<Weight> weight, float scale);
  int rms_norm(View x, std::vector<float> weight, float eps, View residual);  // over every weight.size() columns
  int linear(View x, std::shared_ptr<Weight> weight, View residual);
  int rope(View x, std::size_t head_dim, std::size_t dim, std::vector<float> inverse_frequencies);
  void store_kv(View k, View v, std::shared_ptr<KVLayer> layer);
  int attention(View q, std::shared_ptr<KVLayer> layer, float scale);
  int gated(View x, Gate gate);

  std::size_t columns_of(int buffer) const { return buffers_.at(static_cast<std::size_t>(buffer)).columns; }

  // Those whose memory `run` is given: what was bound, in order, and the last op's output, if it has one.
  std::vector<int> bound_buffers() const;

  // What a run of so many rows, of at most so many sequences, takes besides weights, KV and bound buffers, draft trees
  // not counted.
  std::size_t scratch_bytes(std::size_t rows, std::size_t seqs, std::size_t context);

  // One run at a time: another thread's waits. The batch may be null where no op looks at one; a tap is of an op's
  // output. Throws std::invalid_argument if these do not fit what was recorded, std::bad_alloc.
  void run(const Batch* batch, std::size_t rows, const std::vector<int>& bound_ids, const std::vector<float*>& bound,
           const std::vector<Tap>& taps = {});

 private:
  enum class Op { Embed, RmsNorm, Linear, Rope, StoreKV, Attention, Gated };
  struct Buffer {
    std::size_t columns = 0;
    int bound = -1;      // index into `bound` of run
    int last_use = -1;   // node
    std::size_t at = 0;  // columns before it in the arena
  };
  struct Node {
    Op op;
    View x = {}, residual = {};
    int out = -1;
    std::shared_ptr<Weight> weight = {};
    std::shared_ptr<KVLayer> layer = {};
    std::vector<float> vector = {};
    float number = 0.0f;  // eps, embedding scale or attention scale
    std::size_t head_dim = 0, dim = 0;
    Gate gate = Gate::Silu;
    int table = -1;                         // of cosines and sines
    bool has_codes = false;                 // the rows it multiplies were quantised by who made them
    const Weight* quantizes_for = nullptr;  // its rows as soon as they are made, for an op that multiplies them next
  };
  struct Work;  // of one run

  // To be held while ops are recorded; throws std::runtime_error while a run is under way.
  std::unique_lock<std::mutex> recording();
  void check(const View& view) const;
  void check(const Batch* batch, std::size_t rows) const;
  void check(const Tap& tap, std::size_t rows) const;
  int add(Node node, std::size_t columns);
  void plan();
  void list_weights();
  void plan_memory();
  void plan_codes();
  Quantized codes_for(const Weight& weight, std::size_t rows) const;
  void fill_angles(const std::vector<float>& table, const int32_t* positions, std::size_t rows, float* angles);
  void run_node(const Node& node, Work& work);
  void copy_out(const Tap& tap, const Work& work) const;
  float* memory_of(int buffer, const Work& work) const;
  void run_linear(const Node& node, Work& work);
  void run_attention(const Node& node, Work& work);

  std::shared_ptr<Machine> machine_;
  std::mutex in_use_;
  std::vector<Node> nodes_;
  std::vector<Buffer> buffers_;
  std::vector<std::vector<float>> tables_;  // distinct inverse frequencies
  std::size_t arena_columns_ = 0;
  std::size_t quantized_inputs_ = 0;
  std::size_t embed_rows_ = SIZE_MAX;  // token ids must be below
  std::shared_ptr<WeightRanges> weights_ = std::make_shared<WeightRanges>();
  int num_bound_ = 0;
  bool planned_ = false;
  bool all_packed_ = false;  // all weights have their memory
  Bytes arena_, codes_, angles_, scratch_, states_;
};

}  // namespace octavo
