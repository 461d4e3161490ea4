"""What evaluations find: held-out text while training, and the suites of `farspan eval`."""

from pretrain.metrics.metric import Metric

QUESTIONS = "questions with each token of the answer likeliest, given those before it / questions"

EVAL_DEFINITIONS: tuple[Metric, ...] = (
    Metric(
        "eval/heldout_loss",
        "nats/token",
        "{source: sum of -ln p(token) over the tokens of its held-out rows / their number}",
        "Every eval.every steps, and at the end. The rows are the same each time, so that it can "
        "be compared over steps, and over runs of one eval.seq_len. It rises while train/loss "
        "falls where a run learns by heart.",
        "sum",
        "pretrain/evals/held_out.py",
    ),
    Metric(
        "eval/heldout_perplexity",
        "1",
        "{source: exp(eval/heldout_loss)}",
        "Of so many equally likely tokens the model would be as unsure.",
        "sum",
        "pretrain/evals/held_out.py",
    ),
    Metric(
        "eval/icl_copy",
        "share",
        QUESTIONS,
        "Four symbols, to be repeated. This and those below that begin with icl_ are of `farspan "
        "eval --suite icl`, in RUN/evals, by how many examples of the rule come before.",
        "sum",
        "pretrain/evals/icl.py",
    ),
    Metric(
        "eval/icl_reversal",
        "share",
        QUESTIONS,
        "Four symbols, to be repeated from the last to the first; examples alone tell it from "
        "copying.",
        "sum",
        "pretrain/evals/icl.py",
    ),
    Metric(
        "eval/icl_arithmetic",
        "share",
        QUESTIONS,
        "A digit, to which a number is to be added that the examples tell, modulo 10.",
        "sum",
        "pretrain/evals/icl.py",
    ),
    Metric(
        "eval/icl_pattern",
        "share",
        QUESTIONS,
        "Two symbols, to be put into three places as in the examples.",
        "sum",
        "pretrain/evals/icl.py",
    ),
    Metric(
        "eval/icl_translation",
        "share",
        QUESTIONS,
        "Three words, in a language that is invented for each prompt: each has another word, and "
        "they come in the same order or in reverse.",
        "sum",
        "pretrain/evals/icl.py",
    ),
    Metric(
        "eval/needle",
        "share",
        QUESTIONS,
        "One value that stands once in the document, by how much comes before it. This and "
        "those below are of `farspan eval --suite long`, in RUN/evals, not in metrics.jsonl.",
        "sum",
        "pretrain/evals/long.py",
    ),
    Metric(
        "eval/multi_key",
        "share",
        QUESTIONS,
        "Each of several keys has a value; to mix them up is wrong.",
        "sum",
        "pretrain/evals/long.py",
    ),
    Metric(
        "eval/multi_value",
        "share",
        QUESTIONS,
        "All values of a key, in their order.",
        "sum",
        "pretrain/evals/long.py",
    ),
    Metric(
        "eval/variable_tracking",
        "share",
        QUESTIONS,
        "All variables of a chain of copies, from the value that its first one got.",
        "sum",
        "pretrain/evals/long.py",
    ),
    Metric(
        "eval/overwrite",
        "share",
        QUESTIONS,
        "The last of several values that were written for a key.",
        "sum",
        "pretrain/evals/long.py",
    ),
    Metric(
        "eval/loss_by_position",
        "nats/token",
        "mean of -ln p(token) over tokens predicted from 2^n to 2^(n+1) - 1 others",
        "It falls as far as more context helps; where it rises, the context is too long.",
        "sum",
        "pretrain/evals/by_position.py",
    ),
    Metric(
        "eval/lm_eval",
        "share, or as the task says",
        "what lm-evaluation-harness makes of a task's questions, as acc: right / questions",
        "Of `farspan eval --suite lm-eval`, in RUN/evals, by task and number of examples before a "
        "question. More examples help a model that learns in context; near chance it knows "
        "nothing of the task.",
        "rank 0",
        "pretrain/evals/lm_eval.py",
    ),
)
