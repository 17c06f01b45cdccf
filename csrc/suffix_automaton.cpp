#include "suffix_automaton.h"

#include <algorithm>
#include <queue>
#include <stdexcept>

namespace octavo {

namespace {

// Suffixes of a position whose continuation is counted: in a text of one repeated token there are as many as tokens.
constexpr int kCounted = 48;
// Edges of a state that are looked at for alternatives; behind a single common token there can be as many as tokens.
constexpr int kLookedAt = 32;
constexpr std::size_t kMostTokens = std::size_t{1} << 29;  // ids of states and edges are 32 bits

uint64_t key_of(int32_t state, int32_t token) {
  return static_cast<uint64_t>(static_cast<uint32_t>(state)) << 32 | static_cast<uint32_t>(token);
}

std::size_t hash_of(uint64_t key) {  // the finaliser of splitmix64 (Steele et al., 2014)
  key = (key ^ (key >> 30)) * 0xbf58476d1ce4e5b9u;
  key = (key ^ (key >> 27)) * 0x94d049bb133111ebu;
  return static_cast<std::size_t>(key ^ (key >> 31));
}

}  // namespace

SuffixAutomaton::SuffixAutomaton() : table_(16, {0, kNone}) { states_.push_back({0, kNone, 0}); }

int32_t SuffixAutomaton::find(int32_t state, int32_t token) const {
  const uint64_t key = key_of(state, token);
  const std::size_t mask = table_.size() - 1;
  for (std::size_t at = hash_of(key) & mask;; at = (at + 1) & mask) {
    if (table_[at].second == kNone) return kNone;
    if (table_[at].first == key) return table_[at].second;
  }
}

void SuffixAutomaton::place(int32_t edge_index, uint64_t key) {
  const std::size_t mask = table_.size() - 1;
  std::size_t at = hash_of(key) & mask;
  while (table_[at].second != kNone) at = (at + 1) & mask;
  table_[at] = {key, edge_index};
}

void SuffixAutomaton::add_edge(int32_t state, int32_t token, int32_t target, int32_t taken) {
  if ((edges_.size() + 1) * 2 > table_.size()) {
    std::vector<std::pair<uint64_t, int32_t>> old(table_.size() * 2, {0, kNone});
    old.swap(table_);
    for (const auto& [key, edge] : old) {
      if (edge != kNone) place(edge, key);
    }
  }
  const int32_t index = static_cast<int32_t>(edges_.size());
  edges_.push_back({token, target, states_[state].edges, taken});
  states_[state].edges = index;
  place(index, key_of(state, token));
}

void SuffixAutomaton::count(int32_t state, int32_t token) {
  const int32_t edge = find(state, token);
  State& counted = states_[state];
  ++edges_[edge].taken;
  ++counted.taken;
  if (counted.best == kNone || edges_[edge].taken >= edges_[counted.best].taken) counted.best = edge;
}

void SuffixAutomaton::extend(int32_t token) {
  if (tokens_.size() >= kMostTokens) throw std::length_error("a text of so many tokens is not indexed");
  tokens_.push_back(token);
  const int32_t before = last_;
  const int32_t added = static_cast<int32_t>(states_.size());
  states_.push_back({states_[before].length + 1, 0, static_cast<int32_t>(tokens_.size())});
  int32_t state = before, edge = kNone;
  for (; state != kNone && (edge = find(state, token)) == kNone; state = states_[state].link) {
    add_edge(state, token, added, 0);
  }
  if (state != kNone) {
    const int32_t target = edges_[edge].target;
    if (states_[target].length == states_[state].length + 1) {
      states_[added].link = target;
    } else {  // the shorter substrings of the target end here too: they become a state of their own
      const int32_t clone = static_cast<int32_t>(states_.size());
      State copy = states_[target];
      copy.length = states_[state].length + 1;
      copy.edges = copy.best = kNone;
      states_.push_back(copy);
      const int32_t best = states_[target].best;
      for (int32_t e = states_[target].edges; e != kNone; e = edges_[e].next) {
        const Edge from = edges_[e];  // add_edge may move them
        add_edge(clone, from.token, from.target, from.taken);
        if (e == best) states_[clone].best = static_cast<int32_t>(edges_.size()) - 1;
      }
      for (; state != kNone && (edge = find(state, token)) != kNone && edges_[edge].target == target;
           state = states_[state].link) {
        edges_[edge].target = clone;
      }
      states_[target].link = states_[added].link = clone;
    }
  }
  last_ = added;
  int32_t counted = before;
  for (int n = 0; n < kCounted && counted != kNone; ++n, counted = states_[counted].link) count(counted, token);
}

SuffixAutomaton::Match SuffixAutomaton::own() const {
  if (tokens_.empty() || tokens_.back() < 0) return {};
  const int32_t state = states_[last_].link;
  return {state, states_[state].length};
}

SuffixAutomaton::Match SuffixAutomaton::follow(Match match, int32_t token) const {
  if (token < 0) return {};
  for (int32_t state = match.state; state != kNone; state = states_[state].link) {
    const int32_t edge = find(state, token);
    if (edge != kNone) return {edges_[edge].target, std::min(match.length, states_[state].length) + 1};
  }
  return {};
}

bool SuffixAutomaton::holds(std::string_view left, std::string_view right) const {
  int32_t state = 0;
  for (const std::string_view part : {left, right}) {
    for (const char letter : part) {
      const int32_t edge = find(state, static_cast<uint8_t>(letter));
      if (edge == kNone) return false;
      state = edges_[edge].target;
    }
  }
  return true;
}

std::pair<int32_t, int32_t> SuffixAutomaton::earliest(int32_t max_length) const {
  Match match = own();
  while (match.state != 0 && states_[states_[match.state].link].length >= max_length) {
    match.state = states_[match.state].link;
  }
  if (match.state == 0) return {0, 0};
  return {states_[match.state].first_end, std::min(states_[match.state].length, max_length)};
}

int32_t SuffixAutomaton::kind_of(int32_t length, int32_t taken, int32_t of_all) {
  int32_t of_length = 0;
  while (of_length < kLengths - 1 && length >> of_length != 0) ++of_length;
  return of_length * kShares + (taken == of_all ? 2 : 2 * taken >= of_all ? 1 : 0);
}

SuffixAutomaton::Guess SuffixAutomaton::guess(Match match, int32_t max_tokens, const std::vector<float>& rates,
                                              float min_chance, float min_share, int32_t branches) const {
  struct Candidate {
    float chance, share;  // products of all down to it
    int32_t order, edge, parent, length, kind;
    bool operator<(const Candidate& other) const {  // of equals the one found first
      return chance != other.chance ? chance < other.chance : order > other.order;
    }
  };
  if (rates.size() != static_cast<std::size_t>(kKinds)) throw std::invalid_argument("guess: a rate for each kind");
  Guess found;
  std::priority_queue<Candidate> open;
  int32_t order = 0;
  std::vector<int32_t> others;
  const auto expand = [&](int32_t state, int32_t length, int32_t parent, float chance, float share) {
    while (state > 0 && states_[state].best == kNone) {  // the text's end
      state = states_[state].link;
      length = states_[state].length;
    }
    if (state <= 0) return;
    const State& from = states_[state];
    const auto offer = [&](int32_t number) {
      const Edge& edge = edges_[number];
      if (edge.token < 0 || edge.taken == 0) return;
      const int32_t kind = kind_of(length, edge.taken, from.taken);
      const float mine = chance * rates[static_cast<std::size_t>(kind)];
      const float of_all = share * static_cast<float>(edge.taken) / static_cast<float>(from.taken);
      if (mine >= min_chance && of_all >= min_share) open.push({mine, of_all, order++, number, parent, length, kind});
    };
    offer(from.best);
    if (branches < 2 || edges_[from.best].taken == from.taken) return;
    others.clear();
    int looked_at = 0;
    for (int32_t e = from.edges; e != kNone && looked_at < kLookedAt; e = edges_[e].next, ++looked_at) {
      if (e != from.best) others.push_back(e);
    }
    std::stable_sort(others.begin(), others.end(),
                     [&](int32_t a, int32_t b) { return edges_[a].taken > edges_[b].taken; });
    for (int32_t n = 0; n < static_cast<int32_t>(others.size()) && n < branches - 1; ++n) offer(others[n]);
  };
  expand(match.state, match.length, -1, 1.0f, 1.0f);
  while (!open.empty() && static_cast<int32_t>(found.tokens.size()) < max_tokens) {
    const Candidate next = open.top();
    open.pop();
    const Edge& edge = edges_[next.edge];
    const int32_t index = static_cast<int32_t>(found.tokens.size());
    found.tokens.push_back(edge.token);
    found.parents.push_back(next.parent);
    found.kinds.push_back(next.kind);
    found.chances.push_back(next.chance);
    expand(edge.target, next.length + 1, index, next.chance, next.share);
  }
  return found;
}

SuffixAutomaton::Match SuffixAutomaton::checked(Match match) const {
  if (match.state < 0 || match.state >= static_cast<int32_t>(states_.size()) || match.length < 0 ||
      match.length > states_[match.state].length) {
    throw std::out_of_range("no such match");
  }
  return match;
}

std::size_t SuffixAutomaton::nbytes() const {
  return states_.capacity() * sizeof(State) + edges_.capacity() * sizeof(Edge) + table_.capacity() * sizeof(table_[0]) +
         tokens_.capacity() * sizeof(int32_t);
}

}  // namespace octavo
