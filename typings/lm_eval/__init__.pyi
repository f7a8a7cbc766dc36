from lm_eval import evaluator as evaluator
from lm_eval.evaluator import simple_evaluate as simple_evaluate
