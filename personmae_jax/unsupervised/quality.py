"""How pseudo labels compare with identities: numbers for a person, used by nothing.

The one file that sees both.
"""

import numpy as np
from jaxtyping import Int32, Int64

from personmae_jax.unsupervised.clustering import OUTLIER


def known(
    labels: Int32[np.ndarray, " n"], identities: Int64[np.ndarray, " n"]
) -> dict[str, int | float]:
    """Numbers that all begin with `known_`, of the images that are in a cluster.

    Returns:
      known_ari, known_nmi: Adjusted Rand index, normalised mutual information.
      known_purity: Share of images whose cluster is mostly of their identity.
      known_clusters_per_person: Mean over those who are in any.
    """
    from sklearn import metrics  # takes half a second to import

    is_clustered = labels != OUTLIER
    found, people = labels[is_clustered], identities[is_clustered]
    table = np.zeros((found.max() + 1, len(np.unique(people))), np.int64)
    np.add.at(table, (found, np.unique(people, return_inverse=True)[1]), 1)
    return {
        "known_ari": float(metrics.adjusted_rand_score(people, found)),
        "known_nmi": float(metrics.normalized_mutual_info_score(people, found)),
        "known_purity": float(table.max(axis=1).sum() / table.sum()),
        "known_clusters_per_person": float((table > 0).sum(axis=0).mean()),
    }
