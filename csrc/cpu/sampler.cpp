#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>

namespace octavo {

namespace {

struct RowFacts {
  bool asked = false;
  bool normalized = false;  // whether somebody wants log-probabilities
  std::size_t best = 0;
  float greatest = 0.0f;
  double normalizer = 0.0;
};

// visit(i, who computes) for i below count.
template <class Visit>
void each(const Kernels& kernels, Pool& pool, std::size_t count, const Visit& visit) {
  if (count < static_cast<std::size_t>(pool.threads())) {
    for (std::size_t i = 0; i < count; ++i) visit(i, RowWorkers{kernels, &pool});
    return;
  }
  // Nothing may be thrown through the pool. What is caught is kept by kind: std::exception_ptr would need a newer
  // libstdc++ than manylinux_2_28 has.
  std::mutex mutex;
  bool out_of_memory = false;
  std::string refused;
  pool.parallel(count, 1, [&](std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i) {
      try {
        visit(i, RowWorkers{kernels, nullptr});
      } catch (const std::bad_alloc&) {
        const std::lock_guard<std::mutex> guard(mutex);
        out_of_memory = true;
      } catch (const std::exception& error) {
        const std::lock_guard<std::mutex> guard(mutex);
        refused = error.what();
      }
    }
  });
  if (out_of_memory) throw std::bad_alloc();
  if (!refused.empty()) throw std::invalid_argument(refused);
}

void penalise(std::vector<float>& row, const Changes& changes) {
  if (changes.repetition != 1.0f) {
    std::vector<bool> done(row.size(), false);  // a token of prompt and output is divided once
    const auto repeated = [&](int32_t token) {
      const auto i = static_cast<std::size_t>(token);
      if (done[i]) return;
      done[i] = true;
      row[i] = row[i] > 0.0f ? row[i] / changes.repetition : row[i] * changes.repetition;
    };
    for (const int32_t token : changes.prompt) repeated(token);
    for (const auto& [token, times] : changes.output) repeated(token);
  }
  if (changes.presence == 0.0f && changes.frequency == 0.0f) return;
  for (const auto& [token, times] : changes.output) {
    float& value = row[static_cast<std::size_t>(token)];
    value -= changes.presence;
    value -= changes.frequency * times;
  }
}

void forbid_repeated_ngrams(std::vector<float>& row, const Changes& changes) {
  const std::vector<int32_t>& seen = changes.token_ids;
  const std::size_t size = changes.ngram_size;
  if (size == 0 || seen.size() < size) return;
  const auto last = seen.end() - static_cast<std::ptrdiff_t>(size - 1);
  for (auto first = seen.begin(); first <= last - 1; ++first) {
    const auto following = first + static_cast<std::ptrdiff_t>(size - 1);
    if (std::equal(last, seen.end(), first)) row[static_cast<std::size_t>(*following)] = -INFINITY;
  }
}

void apply(const std::vector<uint8_t>& mask, std::vector<float>& row) {
  for (std::size_t i = 0; i < row.size(); ++i) {
    const std::size_t byte = i / 8;
    if (byte >= mask.size() || (mask[byte] >> (i % 8) & 1) == 0) row[i] = -INFINITY;
  }
}

void process(std::vector<float>& row, const Changes& changes) {
  if (changes.mask) apply(*changes.mask, row);
  if (!changes.allowed.empty()) {
    std::vector<float> kept;
    for (const int32_t token : changes.allowed) kept.push_back(row[static_cast<std::size_t>(token)]);
    std::fill(row.begin(), row.end(), -INFINITY);
    for (std::size_t i = 0; i < kept.size(); ++i) row[static_cast<std::size_t>(changes.allowed[i])] = kept[i];
  }
  for (const int32_t token : changes.forbidden) row[static_cast<std::size_t>(token)] = -INFINITY;
  for (const auto& [token, bias] : changes.bias) row[static_cast<std::size_t>(token)] += bias;
  penalise(row, changes);
  forbid_repeated_ngrams(row, changes);
}

// log(e^a + e^b), as NumPy's logaddexp.
double log_add_exp(double a, double b) {
  if (a == b) return a + 0.693147180559945309417232121458176568;  // ln 2; also where both are infinite
  const double difference = a - b;
  return difference > 0.0 ? a + std::log1p(std::exp(-difference)) : b + std::log1p(std::exp(difference));
}

// Answers one request, or one draw of it, from its row.
class Answering {
 public:
  Answering(const RowWorkers& workers, const float* row, std::size_t vocab, const RowFacts& facts)
      : workers_(workers), row_(row), vocab_(vocab), facts_(facts) {}

  // False if nothing is left to draw.
  bool draw(const Draw& draw, int32_t& token, TokenLogprob& logprob, std::vector<TokenLogprob>& top) const {
    Greatest greatest{facts_.best, facts_.greatest};
    const float* from = row_;
    std::vector<float> changed;
    if (draw.changes) {
      changed.assign(row_, row_ + vocab_);
      process(changed, *draw.changes);
      greatest = octavo::greatest(workers_, changed.data(), vocab_);
      if (!std::isfinite(greatest.second)) return false;
      from = changed.data();
    }
    const std::size_t drawn =
        draw.greedy ? greatest.first : octavo::draw(workers_, from, vocab_, greatest, draw.filters, draw.key);
    token = static_cast<int32_t>(drawn);
    if (draw.logprobs) {
      logprob = ranked(token);
      top = alternatives(*draw.logprobs);
    }
    return true;
  }

  void answer(const TopK& want, RowAnswer& answer) const {
    std::vector<float> values(vocab_);
    log_softmax(workers_, row_, vocab_, facts_.normalizer, values.data());
    if (want.changes) process(values, *want.changes);
    answer.tokens = best(workers_, values.data(), vocab_, std::min(want.k, vocab_));
    for (const int32_t token : answer.tokens) answer.values.push_back(values[static_cast<std::size_t>(token)]);
    if (!want.logprobs) return;
    for (const int32_t token : answer.tokens) answer.logprobs.push_back(ranked(token));
    answer.tops.push_back(alternatives(*want.logprobs));
  }

  void answer(const Score& want, RowAnswer& answer) const {
    for (const std::vector<int32_t>& set : want.sets) {
      double sum = -INFINITY;
      for (const int32_t token : set) sum = log_add_exp(sum, static_cast<double>(value(token)));
      answer.values.push_back(sum - facts_.normalizer);
    }
  }

  void answer(const NextLogprobs& want, RowAnswer& answer) const {
    answer.logprobs.push_back(ranked(want.token));
    answer.tops.push_back(alternatives(want.top));
  }

  void answer(const std::vector<Draw>&, RowAnswer&) const {}  // each by itself

 private:
  float value(int32_t token) const { return row_[static_cast<std::size_t>(token)]; }

  TokenLogprob entry(int32_t token, std::size_t rank) const {
    return {token, static_cast<double>(value(token)) - facts_.normalizer, rank};
  }

  // The rank is counted on the logits: two of them may round to one log-probability.
  TokenLogprob ranked(int32_t token) const {
    return entry(token, 1 + workers_.kernels.row_rank(row_, vocab_, static_cast<std::size_t>(token)));
  }

  std::vector<TokenLogprob> alternatives(std::size_t count) const {
    std::vector<TokenLogprob> all;
    for (const int32_t token : best(workers_, row_, vocab_, std::min(count, vocab_))) {
      all.push_back(entry(token, all.size() + 1));
    }
    return all;
  }

  RowWorkers workers_;
  const float* row_;
  std::size_t vocab_;
  const RowFacts& facts_;
};

bool wants_logprobs(const RowRequest& request) {
  const auto* draws = std::get_if<std::vector<Draw>>(&request.want);
  return draws == nullptr ||
         std::any_of(draws->begin(), draws->end(), [](const Draw& draw) { return draw.logprobs.has_value(); });
}

}  // namespace

std::vector<RowAnswer> sample(const Kernels& kernels, Pool& pool, const float* logits, std::size_t vocab,
                              const std::vector<RowRequest>& requests) {
  std::vector<RowFacts> facts;
  std::vector<std::size_t> asked;
  for (const RowRequest& request : requests) {
    if (request.row >= facts.size()) facts.resize(request.row + 1);
    RowFacts& row = facts[request.row];
    if (!row.asked) asked.push_back(request.row);
    row.asked = true;
    row.normalized |= wants_logprobs(request);
  }
  each(kernels, pool, asked.size(), [&](std::size_t i, const RowWorkers& workers) {
    const float* x = logits + asked[i] * vocab;
    RowFacts& row = facts[asked[i]];
    std::tie(row.best, row.greatest) = greatest(workers, x, vocab);
    if (row.normalized && std::isfinite(row.greatest)) row.normalizer = log_sum_exp(workers, x, vocab, row.greatest);
  });

  struct Job {
    std::size_t request, draw;
  };
  std::vector<Job> jobs;
  std::vector<RowAnswer> answers(requests.size());
  for (std::size_t r = 0; r < requests.size(); ++r) {
    const RowFacts& row = facts[requests[r].row];
    RowAnswer& answer = answers[r];
    answer.greatest = row.greatest;
    if (!std::isfinite(row.greatest)) {
      answer.failure = RowAnswer::Failure::Damaged;
      continue;
    }
    const auto* draws = std::get_if<std::vector<Draw>>(&requests[r].want);
    if (draws == nullptr) {
      jobs.push_back({r, 0});
      continue;
    }
    answer.tokens.assign(draws->size(), static_cast<int32_t>(row.best));
    if (wants_logprobs(requests[r])) {
      answer.logprobs.resize(draws->size());
      answer.tops.resize(draws->size());
    }
    for (std::size_t d = 0; d < draws->size(); ++d) {
      const Draw& draw = (*draws)[d];
      if (!draw.greedy || draw.changes || draw.logprobs) jobs.push_back({r, d});  // else it is the best token
    }
  }
  std::vector<char> left(jobs.size(), true);  // char: threads write to neighbours
  each(kernels, pool, jobs.size(), [&](std::size_t i, const RowWorkers& workers) {
    const auto [r, d] = jobs[i];
    const RowRequest& request = requests[r];
    RowAnswer& answer = answers[r];
    const Answering row(workers, logits + request.row * vocab, vocab, facts[request.row]);
    if (const auto* draws = std::get_if<std::vector<Draw>>(&request.want)) {
      TokenLogprob unwanted;
      std::vector<TokenLogprob> none;
      const bool listed = !answer.logprobs.empty();
      left[i] = row.draw((*draws)[d], answer.tokens[d], listed ? answer.logprobs[d] : unwanted,
                         listed ? answer.tops[d] : none);
    } else {
      std::visit([&](const auto& want) { row.answer(want, answer); }, request.want);
    }
  });
  for (std::size_t i = 0; i < jobs.size(); ++i) {
    if (!left[i]) answers[jobs[i].request].failure = RowAnswer::Failure::NothingLeft;
  }
  return answers;
}

}  // namespace octavo
