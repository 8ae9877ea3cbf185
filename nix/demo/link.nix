# A store path with one symlink in it, made without running a single program: { name = "sh"; target = <store path>; }
# becomes $out/sh → target.
#
# Who starts with nothing but one executable file has no program to make even a link with, and cannot call the file by
# another name either: Nix passes "<hash>-<name>" as argv[0], and the sandbox of a chroot store has no /bin/sh in every
# Nix.  But every Nix has a builder of its own that unpacks a tar archive, and the oldest kind of tar header (V7, 512 bytes)
# is nothing but text if all its fields are filled up to their end.  So here is an archive with one member, written in Nix.
{ name, target }:
let
  inherit (builtins)
    concatStringsSep
    foldl'
    genList
    listToAttrs
    stringLength
    substring
    toFile
    unsafeDiscardStringContext
    ;

  times = n: text: concatStringsSep "" (genList (_: text) n);
  fill =
    width: char: text:
    times (width - stringLength text) char + text;

  octal = n: (if n < 8 then "" else octal (n / 8)) + toString (n - n / 8 * 8);

  # The checksum is the sum of all bytes, its own field taken as blanks.
  printable = " !\"#$%&'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]^_`abcdefghijklmnopqrstuvwxyz{|}~";
  code = listToAttrs (
    genList (i: {
      name = substring i 1 printable;
      value = i + 32;
    }) (stringLength printable)
  );
  sum = text: foldl' (total: i: total + code.${substring i 1 text}) 0 (genList (i: i) (stringLength text));

  # name (100), mode (8), uid (8), gid (8), size (12), mtime (12)
  head = times 48 "./" + "link" + "0000777 " + "0000000 " + "0000000 " + "00000000000 " + "00000000001 ";
  # type (1): a symlink, target (100), unused (255); the builder renames the only member to channelName
  tail = "2" + fill 100 "/" "${target}" + times 255 " ";
  checksum = sum (unsafeDiscardStringContext (head + times 8 " " + tail));
in
assert stringLength "${target}" <= 100;
derivation {
  name = "${name}-link";
  system = "builtin";
  builder = "builtin:unpack-channel";
  channelName = name;
  src = toFile "${name}-link.tar" (head + fill 6 "0" (octal checksum) + "  " + tail);
}
