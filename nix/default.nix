# What this project builds with Nix.  Every attribute is lazy in `pkgs` and `nix2container`: `manifestYAML` and `demo`
# work where there is neither nixpkgs nor a network.
{
  system,
  pkgs,
  nix2container,
  imageRef ? null,
}:
let
  cknix-csi = pkgs.callPackage ./package.nix { };
in
{
  inherit cknix-csi;

  # The container image that the files of yaml/ run: `nix run --file . image.copyToRegistry`, `image.copyToPodman`.
  image = pkgs.callPackage ./image.nix { inherit cknix-csi nix2container; };

  # yaml/*.yaml as one stream: `kubectl apply -f $(nix-build -A manifestYAML --argstr imageRef example.org/cknix-csi:1)`.
  manifestYAML = import ./manifest.nix { inherit imageRef; };

  # The package set of the demo and the tests; `-I cknix-demo-busybox=/usr/bin/busybox` says where busybox is.
  demo = import ./demo { inherit system; };
}
