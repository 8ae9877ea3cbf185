# The same packages as a flake without inputs, for `flakeRef`:  path:/some/where/demo#hello
#
# A flake is evaluated purely and sees only its own files, so a static busybox has to be one of them: copy this directory
# and put the program beside this file as `busybox`.  (It is not in the repository: it is a binary, and another one for
# each system.)
{
  description = "A small package set for the demo and the tests of cknix; needs a static ./busybox beside it";

  outputs =
    { self }:
    let
      inherit (builtins)
        attrNames
        filter
        listToAttrs
        map
        pathExists
        tryEval
        ;

      busybox =
        if pathExists ./busybox then
          ./busybox
        else
          throw "put a static busybox beside ${toString ./flake.nix}, for example: cp /usr/bin/busybox .";

      forSystems =
        make:
        listToAttrs (
          map
            (system: {
              name = system;
              value = make (import ./default.nix { inherit system busybox; });
            })
            [
              "x86_64-linux"
              "aarch64-linux"
            ]
        );

      isPackage = value: (tryEval (value.type or null == "derivation")).value;
    in
    {
      # Everything, also the functions and what fails on purpose.
      legacyPackages = forSystems (set: set);

      packages = forSystems (
        set:
        listToAttrs (
          map (name: {
            inherit name;
            value = set.${name};
          }) (filter (name: isPackage set.${name}) (attrNames set))
        )
        // {
          default = set.hello;
        }
      );
    };
}
