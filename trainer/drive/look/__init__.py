"""Looking at runs: what their files say (``gather``, ``scores``), once, and the tables and curves of that.

``tables`` and ``compare`` make of the data what is shown; ``terminal`` and ``page`` only draw it. A figure is made in
one place, and the terminal and the page cannot disagree.
"""
