# A small package set that needs nothing but a static busybox: no nixpkgs, no compiler, no network, no /bin/sh in the
# sandbox.  It serves the demo (`yaml/test/expression.yaml`) and the tests, so it has what real closures have.
#
#     (import <cknix-demo> {}).hello
#
# with the search path  cknix-demo=<this directory>  cknix-demo-busybox=<a static busybox, e.g. /usr/bin/busybox>.
# README.md beside this file says what each package is for.
{
  system ? builtins.currentSystem,
  busybox ? <cknix-demo-busybox>,
  ...
}:
let
  inherit (builtins)
    concatStringsSep
    foldl'
    genList
    path
    toFile
    ;

  binary = path {
    path = busybox;
    name = "busybox-static";
  };

  # busybox takes the applet's name from its own, and "<hash>-busybox-static" is none: call it by a better one.
  start = import ./link.nix {
    name = "busybox";
    target = binary;
  };

  # `script` becomes what `attrs.outputs` name ($out if there is no such attribute), with every applet on the PATH.
  build =
    name: attrs: script:
    derivation (
      {
        inherit name system;
        builder = "${tools}/bin/sh";
        args = [
          "-euc"
          script
        ];
        PATH = "${tools}/bin";
      }
      // attrs
    );

  tools = derivation {
    name = "busybox";
    inherit system;
    builder = "${start}/busybox";
    args = [
      "sh"
      "-euc"
      ''
        busybox=${start}/busybox
        $busybox mkdir -p $out/bin
        $busybox cp ${binary} $out/bin/busybox
        $busybox chmod 0555 $out/bin/busybox
        $out/bin/busybox --install -s $out/bin
      ''
    ];
  };

  # --- hello: one program, and one store path of each kind as its dependencies ---

  words = build "hello-words" { } ''
    mkdir -p $out/share/hello
    echo Hello > $out/share/hello/en
    echo Hallo > $out/share/hello/de
    echo Bonjour > $out/share/hello/fr
  '';

  word = build "hello-word" { } ''
    ln -s ${words}/share/hello/en $out
  '';

  # The same program with another text: what an update of an Expression needs.
  greet =
    text:
    let
      # A store path that is a file.
      message = toFile "hello-message" "${text}\n";
    in
    build "hello" { } ''
      mkdir -p $out/bin
      cat > $out/bin/hello <<EOF
      #!${tools}/bin/sh
      # A directory (busybox), a symlink (word) and a file (message): each is a store path of its own.
      read -r word < ${word}
      read -r message < ${message}
      echo "\$word from $out: \$message"
      EOF
      chmod +x $out/bin/hello
    '';

  hello = greet "every path below /nix/store here is a part of this program's closure.";

  # `n` paths, each with a reference to the one before.
  chain =
    n:
    foldl' (
      previous: i:
      build "chain-${toString i}" { } (
        if previous == null then "echo the first link > $out" else "echo after ${previous} > $out"
      )
    ) null (genList (i: i + 1) n);

  # `n` paths, one of them with references to all the others.
  wide =
    n:
    build "wide" { } ''
      echo ${
        concatStringsSep " " (
          genList (i: build "wide-${toString (i + 1)}" { } "echo leaf ${toString (i + 1)} > $out") (n - 1)
        )
      } > $out
    '';

  # The same two shapes with a single build, for closures of hundreds of paths.
  chainFast =
    n:
    let
      last = foldl' (
        previous: i: toFile "chain-${toString i}" "after ${if previous == null then "nothing" else previous}\n"
      ) null (genList (i: i + 1) (n - 1));
    in
    build "chain-${toString n}" { } "echo after ${toString last} > $out";

  wideFast =
    n:
    let
      leaves = genList (i: "leaf${toString (i + 1)}") (n - 1);
    in
    build "wide" { outputs = [ "out" ] ++ leaves; } ''
      for leaf in ${toString leaves}; do
        eval "path=\$$leaf"
        echo $leaf > $path
        echo $path >> list
      done
      cat list > $out
    '';
in
rec {
  inherit
    hello
    greet
    chain
    wide
    chainFast
    wideFast
    ;

  # bin/busybox and a link for each of its applets: with it on the PATH a closure is a small Unix.
  busybox = tools;

  # One bin/ for a pod's PATH: the applets and hello, as links into their own store paths.
  toolbox = build "toolbox" { } ''
    mkdir -p $out/bin
    ln -s ${tools}/bin/* ${hello}/bin/* $out/bin/
  '';

  # Something that keeps running: `serve [port]` answers HTTP requests with the files of webroot.
  web = build "web" { } ''
    mkdir -p $out/bin
    cat > $out/bin/serve <<EOF
    #!${tools}/bin/sh
    exec ${tools}/bin/httpd -f -v -p "\''${1:-8080}" -h ${webroot}
    EOF
    chmod +x $out/bin/serve
  '';

  webroot = build "webroot" { } ''
    mkdir -p $out/img
    cat > $out/index.html <<'EOF'
    <!doctype html><title>cknix</title><img src="img/dot.svg" alt=""><h1>Served from a Nix closure</h1>
    EOF
    cat > $out/img/dot.svg <<'EOF'
    <svg xmlns="http://www.w3.org/2000/svg" width="16" height="16"><circle cx="8" cy="8" r="8" fill="#5277c3"/></svg>
    EOF
  '';

  # Three outputs: `out` needs `lib`, nothing needs `doc`.
  multi =
    build "multi"
      {
        outputs = [
          "out"
          "lib"
          "doc"
        ];
      }
      ''
        mkdir -p $out/bin $lib/lib $doc/share/doc
        echo 'the library' > $lib/lib/libmulti.txt
        printf '#!%s\n%s %s\n' ${tools}/bin/sh ${tools}/bin/cat $lib/lib/libmulti.txt > $out/bin/multi
        chmod +x $out/bin/multi
        echo 'see also' $out > $doc/share/doc/multi.txt
      '';

  # Every kind of content that a store path may have.
  shapes = build "shapes" { } ''
    mkdir -p $out/bin $out/share/small $out/empty/directory $out/names $out/links $out/same
    cd $out

    echo '#!${tools}/bin/sh' > bin/run
    echo 'echo ran' >> bin/run
    cp bin/run bin/run-by-owner
    chmod 0555 bin/run
    chmod 0700 bin/run-by-owner
    echo secret > share/private
    chmod 0600 share/private
    : > share/empty

    # 500 small files, and a directory that is deep
    for i in $(seq 20); do
      mkdir share/small/$i
      for j in $(seq 25); do echo "$i $j" > share/small/$i/$j; done
    done
    deep=share/deep
    for i in $(seq 30); do deep=$deep/level-$i; done
    mkdir -p $deep
    echo bottom > $deep/file

    # 8 MiB, mostly a hole, and 1 MiB that does not compress to nothing
    echo begin > share/big
    truncate -s 8388604 share/big
    echo end >> share/big
    seq 1 1000000 | head -c 1048576 > share/numbers

    # the same content three times: `nix-store --optimise` makes one file of it
    for i in 1 2 3; do seq 1 1000 > same/$i; done

    name=
    for i in $(seq 51); do name=''${name}long-; done
    echo long > names/$name
    echo space > 'names/with space'
    echo quotes > "names/it's \"quoted\""
    echo newline > 'names/two
    lines'
    echo backslash > 'names/back\slash'
    echo utf-8 > 'names/Grüße-日本語-🙂'
    echo latin-1 > "names/$(printf 'caf\351')"
    echo dash > names/-rf
    echo star > 'names/*'
    echo dot > names/.hidden

    ln -s ../share/small/1/1 links/relative
    ln -s $out/share/small/1/2 links/absolute
    ln -s ${tools}/bin/sh links/elsewhere
    ln -s ../share/small links/directory
    ln -s nowhere links/dangling
    ln -s loop links/loop
    ln -s /etc/passwd links/outside
  '';

  # Store paths that are no directory.
  file = build "file.txt" { } ''
    echo 'a store path that is a file' > $out
  '';

  executableFile = build "executable-file" { } ''
    printf '#!%s\necho a store path that is a program\n' ${tools}/bin/sh > $out
    chmod +x $out
  '';

  link = build "link" { } ''
    ln -s ${hello}/bin/hello $out
  '';

  danglingLink = build "dangling-link" { } ''
    ln -s /nowhere/at/all $out
  '';

  emptyDirectory = build "empty-directory" { } ''
    mkdir $out
  '';

  # 207 bytes: Nix allows 211, and the derivation's own name ends in ".drv".
  longName = build (concatStringsSep "" (genList (_: "long-") 41) + "er") { } ''
    mkdir $out
    echo 'a long name' > $out/file
  '';

  # --- what goes wrong ---

  broken = build "broken" { } ''
    echo 'configuring'
    echo 'compiling 1 of 2'
    echo 'compiling 2 of 2'
    echo 'cknix-demo: this package is broken on purpose' >&2
    exit 3
  '';

  # Fails because of something else.
  needsBroken = build "needs-broken" { } ''
    echo ${broken} > $out
  '';

  # Evaluates to nothing that could be built.
  notAPackage = 42;

  throws = throw "cknix-demo: this evaluation fails on purpose";

  # Takes its time and says so; another tag is another build.
  slow =
    {
      seconds ? 10,
      tag ? "slow",
    }:
    build "slow-${tag}" { } ''
      for second in $(seq ${toString seconds}); do
        echo "${tag}: second $second of ${toString seconds}"
        sleep 1
      done
      mkdir -p $out/bin
      printf '#!%s\necho %s took %s seconds to build\n' ${tools}/bin/sh ${tag} ${toString seconds} > $out/bin/slow
      chmod +x $out/bin/slow
    '';
}
