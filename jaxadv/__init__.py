"""jaxadv: attack, train, certify, privatize, explain and analyze any classifier that is a pure function.

`import jaxadv as ja` loads nothing heavy: rooms are imported when first named, and no backend is initialized.
"""
