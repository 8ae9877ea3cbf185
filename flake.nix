{
  description = "cknix: Nix closures as Kubernetes volumes";

  # No inputs, on purpose: `nix build .#manifestYAML` works offline and there is nothing to lock or to update.  Who has
  # nixpkgs hands it in: a flake through `overlays.default`, a person with `nix build --impure .#cknix-csi` and a
  # search path.
  outputs =
    { self }:
    let
      forSystems =
        make:
        builtins.listToAttrs (
          map (system: {
            name = system;
            value = make (import ./default.nix { inherit system; });
          }) (import ./nix/systems.nix)
        );
    in
    {
      packages = forSystems (front: {
        inherit (front) manifestYAML;
        default = front.manifestYAML;
      });

      # Everything, also what needs nixpkgs: no `nix flake` command evaluates these unasked.
      legacyPackages = forSystems (front: front);

      overlays.default = import ./nix/overlay.nix;
    };
}
