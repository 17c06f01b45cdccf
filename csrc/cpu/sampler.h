// What is asked of rows of logits, answered all at once; see octavo.core.want and octavo.sampling.sampler.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>
#include <variant>
#include <vector>

#include "sampling.h"

namespace octavo {

// What is done to a copy of the row before a token is drawn, in the order of the fields; see
// octavo.sampling.processors. All in float32.
struct Changes {
  std::optional<std::vector<uint8_t>> mask;  // a bit for each token that is allowed, a byte's lowest first
  std::vector<int32_t> allowed;              // none: all
  std::vector<int32_t> forbidden;
  std::vector<std::pair<int32_t, float>> bias;
  float repetition = 1.0f, presence = 0.0f, frequency = 0.0f;
  std::vector<int32_t> prompt;                    // each token once
  std::vector<std::pair<int32_t, float>> output;  // each token once, with its occurrences
  std::vector<int32_t> token_ids;                 // all, for no n-gram to come twice
  std::size_t ngram_size = 0;                     // 0: off
};

struct Draw {
  bool greedy;
  Filters filters;
  NoiseKey key;
  std::optional<std::size_t> logprobs;  // with so many best tokens
  std::optional<Changes> changes;
};

struct TopK {
  std::size_t k;
  std::optional<std::size_t> logprobs;
  std::optional<Changes> changes;
};

struct Score {
  std::vector<std::vector<int32_t>> sets;
};

struct NextLogprobs {
  int32_t token;
  std::size_t top;
};

struct RowRequest {
  std::size_t row;
  std::variant<std::vector<Draw>, TopK, Score, NextLogprobs> want;
};

struct TokenLogprob {
  int32_t token;
  double logprob;    // of the raw logits
  std::size_t rank;  // from 1
};

struct RowAnswer {
  enum class Failure { None, Damaged, NothingLeft };
  Failure failure = Failure::None;
  float greatest = 0.0f;                        // of the row
  std::vector<int32_t> tokens;                  // one a draw, or candidates, best first
  std::vector<double> values;                   // of candidates, or one a set
  std::vector<TokenLogprob> logprobs;           // of the tokens; of a draw that wants none nothing is meant
  std::vector<std::vector<TokenLogprob>> tops;  // one a draw; else one for all
};

// Logits [.., vocab]; rows and token ids are inside. Rows go to threads where there are enough of them, else the pieces
// of a row: what comes out is the same. Throws std::invalid_argument if a row becomes NaN meanwhile.
std::vector<RowAnswer> sample(const Kernels& kernels, Pool& pool, const float* logits, std::size_t vocab,
                              const std::vector<RowRequest>& requests);

}  // namespace octavo
