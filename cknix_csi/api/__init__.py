"""The public vocabulary of cknix as pure values: no I/O, nothing imported from the other packages."""
