// llama.cpp's own samplers, called from Python: its src/llama-sampler.cpp, and a vocabulary that Python fills.
#include "llama-sampler.cpp"

static std::vector<std::string> words;
static int (*encode)(const char * text, int n, llama_token * out) = nullptr;

struct llama_vocab::impl {};
llama_vocab::llama_vocab() {}
llama_vocab::~llama_vocab() {}
uint32_t llama_vocab::n_tokens() const { return words.size(); }
std::string llama_vocab::detokenize(const std::vector<llama_token> & tokens, bool) const { return words[tokens[0]]; }
std::vector<llama_token> llama_vocab::tokenize(const std::string & text, bool, bool) const {
    std::vector<llama_token> out(text.size() + 1);
    out.resize(encode(text.data(), text.size(), out.data()));
    return out;
}
time_meas::time_meas(int64_t & t_acc, bool) : t_start_us(-1), t_acc(t_acc) {}
time_meas::~time_meas() {}
void llama_log_internal(enum ggml_log_level, const char *, ...) {}

extern "C" {
void peer_vocab(int n, const char ** texts, const int * lengths, int (*function)(const char *, int, llama_token *)) {
    words.clear();
    for (int i = 0; i < n; ++i) words.emplace_back(texts[i], lengths[i]);
    encode = function;
}

// DRY with breakers as tokens: breaker i is tokens[bounds[i]] to tokens[bounds[i + 1] - 1]
llama_sampler * peer_dry(float multiplier, float base, int allowed, int last_n, int n, const int * bounds, const int * tokens) {
    std::vector<std::vector<llama_token>> breakers;
    for (int i = 0; i < n; ++i) breakers.emplace_back(tokens + bounds[i], tokens + bounds[i + 1]);
    return llama_sampler_init_dry_testing(multiplier, base, allowed, last_n, breakers);
}

// the breakers of DRY for a text, each as head, length of tail, tail; returns how many numbers there are, -1: too many
int peer_breakers(const char * text, int * out, int most) {
    llama_vocab vocab;
    llama_sampler * sampler = llama_sampler_init_dry(&vocab, 1.0f, 2.0f, 2, 64, &text, 1);
    int n = 0;
    for (const auto & [head, tail] : ((llama_sampler_dry *) sampler->ctx)->dry_processed_breakers) {
        if (n + 2 + (int) tail.size() > most) return -1;
        out[n++] = head;
        out[n++] = tail.size();
        for (auto token : tail) out[n++] = token;
    }
    llama_sampler_free(sampler);
    return n;
}

// logits [n] -> out [n]: -inf for the tokens that the sampler took away
void peer_apply(llama_sampler * sampler, int n, const float * logits, float * out) {
    std::vector<llama_token_data> data(n);
    for (int i = 0; i < n; ++i) data[i] = {i, logits[i], 0.0f};
    llama_token_data_array array = {data.data(), data.size(), -1, false};
    sampler->iface->apply(sampler, &array);
    std::fill(out, out + n, -INFINITY);
    for (size_t i = 0; i < array.size; ++i) out[array.data[i].id] = array.data[i].logit;
}
}
