"""The laboratory: trials of the methods on real data, at equal budget, over paired seeds, with a verdict.

Needs the extra `danlu[lab]`. The command line is `danlu`; from Python start at
[`find_trial`][danlu.lab.trial.find_trial] and [`run_trial`][danlu.lab.runner.run_trial].
"""
