"""Interventions: changes of the rows that training reads, from one step of a run to another.

Source  The case study of Pythia, Biderman et al. 2023, arXiv:2304.01373, section 3.1, changes the
        pronouns in the last part of training.
"""
