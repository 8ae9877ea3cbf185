# Plain Nix's way in:  nix-build -A manifestYAML,  nix build --file . cknix-csi
#
# Nothing here is fetched.  `pkgs` and `nix2container` come from the search path or as arguments, and only the attributes
# that need them ever look:  nix build --file . image --arg pkgs 'import ./somewhere {}'
{
  system ? builtins.currentSystem,
  pkgs ? import <nixpkgs> { inherit system; },
  nix2container ? (import <nix2container> { inherit pkgs; }).nix2container,
  imageRef ? null,
}:
import ./nix {
  inherit
    system
    pkgs
    nix2container
    imageRef
    ;
}
