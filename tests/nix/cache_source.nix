# What the cache's tests fetch: input-addressed paths (only those need a signature) with references, in every shape.
let
  build =
    name: script:
    derivation {
      inherit name;
      system = builtins.currentSystem;
      builder = "/bin/busybox";
      args = [ "sh" "-euc" "b=/bin/busybox; ${script}" ];
    };

  library = build "library" ''
    $b mkdir -p $out/lib
    echo library > $out/lib/data
    echo $out > $out/lib/self
  '';
  program = build "program" ''
    printf '#!/bin/sh\ncat ${library}/lib/data\n' > $out
    $b chmod +x $out
  '';
  link = build "link" "$b ln -s ${program} $out";
  result = build "result" ''
    $b mkdir -p $out/bin
    $b ln -s ${link} $out/bin/program
    echo ${library} > $out/references
  '';
  shapes = build "shapes" ''
    $b mkdir -p $out/empty $out/a/b/c
    $b ln -s ../nowhere $out/a/dangling
    $b ln -s "$(printf 'a b\nc\377')" "$out/a/link to an odd name"
    echo 1 > "$out/with space"
    echo 2 > "$out/$(printf 'new\nline')"
    echo 3 > "$out/$(printf 'not-utf8-\377\376')"
    echo 4 > $out/ünïcode
    echo 5 > "$out/quote'\"\\%41&?#"
    echo 6 > $out/executable
    $b chmod +x $out/executable
    : > $out/empty-file
    i=0; while [ $i -lt 300 ]; do echo $i > $out/a/b/$i; i=$((i + 1)); done
    $b truncate -s 100M $out/sparse
    printf end >> $out/sparse
    echo ${result} > $out/reference
  '';
in
{
  inherit result shapes;
}
