"""The controller: reconciles Expressions into published closures.

``app`` starts everything; ``operator`` is all that touches kopf; ``supervisor`` keeps one task per Expression, which
runs ``reconcile``; ``status`` holds the rules of what is shown and kept, as pure functions.
"""
