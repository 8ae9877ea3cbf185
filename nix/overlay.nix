# For a configuration that has nixpkgs already: `pkgs.cknix-csi`.
final: _previous: {
  cknix-csi = final.callPackage ./package.nix { };
}
