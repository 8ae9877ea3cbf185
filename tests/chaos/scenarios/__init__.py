"""The scenarios, by what fails; importing this adds all of them to the list, in the order of the table."""

from tests.chaos.scenarios import daemons, claims, kubernetes, caches, machines, disks, versions, load  # noqa: F401, I001
