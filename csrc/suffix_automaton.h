// The suffix automaton of a growing text of token ids (Blumer et al., 1985): a state for each set of substrings that
// end at the same positions, at most two states and three edges a token. It knows for the end of the text, or of any
// other, the longest suffix that the text holds, and how that went on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

namespace octavo {

class SuffixAutomaton {
 public:
  // A suffix of some text, of this length, that occurs in this one. State 0 is the empty one.
  struct Match {
    int32_t state = 0;
    int32_t length = 0;
  };
  // Guesses of what follows: token i comes after token parents[i], -1: after the match. A token's parent stands before
  // it. `kinds`: see kind_of. `chances`: that a token and all it follows come true.
  struct Guess {
    std::vector<int32_t> tokens, parents, kinds;
    std::vector<float> chances;
  };

  // What the chance of a guess depends on: the length of what was matched before it (0, 1, 2-3, 4-7, 8-15, more), and
  // of the times that something followed, how often it was this token (less than half, more, always).
  static constexpr int32_t kLengths = 6, kShares = 3, kKinds = kLengths * kShares;
  static int32_t kind_of(int32_t length, int32_t taken, int32_t of_all);

  SuffixAutomaton();

  // Appends a token. A negative one separates texts: `follow` matches nothing that has it, and no guess goes across it.
  // Takes constant time on average.
  void extend(int32_t token);

  // The longest suffix of the text that occurs before its end as well.
  Match own() const;

  // The longest suffix of a matched text and a token behind it that occurs here.
  Match follow(Match match, int32_t token) const;

  // Whether two texts of bytes, put together, occur in this one.
  bool holds(std::string_view left, std::string_view right) const;

  // Where the first occurrence of the text's suffix of at most so many tokens ends, as the position behind it, and the
  // suffix's length; length 0 if none occurs before the end.
  std::pair<int32_t, int32_t> earliest(int32_t max_length) const;

  // The likeliest continuations: at most so many tokens, of each parent at most so many branches. `rates` [kKinds]: how
  // often guesses of a kind come true. None is less likely than `min_chance`, nor is the product of its and its
  // parents' shares less than `min_share`. Where the text ends the guess goes on from the longest suffix that went on,
  // so that a text that repeats itself is guessed for more than one round.
  Guess guess(Match match, int32_t max_tokens, const std::vector<float>& rates, float min_chance, float min_share,
              int32_t branches) const;

  // A match as a caller had it from here; throws std::out_of_range for one that cannot be.
  Match checked(Match match) const;

  const std::vector<int32_t>& tokens() const { return tokens_; }
  std::size_t nbytes() const;

 private:
  static constexpr int32_t kNone = -1;

  struct State {
    int32_t length;         // of its longest substring
    int32_t link;           // the state of its longest suffix in another one
    int32_t first_end;      // position behind its first occurrence
    int32_t edges = kNone;  // list of all
    int32_t best = kNone;   // the edge taken most often, of equals the latest
    int32_t taken = 0;      // how often any was
  };
  struct Edge {
    int32_t token, target, next;
    int32_t taken;
  };

  int32_t find(int32_t state, int32_t token) const;  // edge or kNone
  void add_edge(int32_t state, int32_t token, int32_t target, int32_t taken);
  void place(int32_t edge_index, uint64_t key);
  void count(int32_t state, int32_t token);

  std::vector<State> states_;
  std::vector<Edge> edges_;
  std::vector<std::pair<uint64_t, int32_t>> table_;  // open addressing: (state, token) -> edge; kNone: free
  std::vector<int32_t> tokens_;
  int32_t last_ = 0;
};

}  // namespace octavo
