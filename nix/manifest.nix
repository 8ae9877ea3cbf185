# The files of yaml/ as one stream of documents, made by evaluation alone.
#
# The result is a file of which content and hash are known before anything is built, so it is a fixed-output derivation, and
# Nix's own `builtin:fetchurl` "downloads" it from the store: no shell, no nixpkgs, no network, in every kind of store and
# sandbox.  (`builtins.toFile` alone would do, but `nix build` of 2.8 takes a derivation only.)
{
  # What to run instead of the image that the files name.
  imageRef ? null,
  directory ? ../yaml,
}:
let
  inherit (builtins)
    attrNames
    concatMap
    concatStringsSep
    elemAt
    filter
    genList
    hashString
    head
    isString
    length
    match
    readDir
    readFile
    split
    ;

  lines = text: filter isString (split "\n" text);

  # yaml/test is for people to try things: it is not a part of the installation.
  names =
    let
      entries = readDir directory;
    in
    filter (name: entries.${name} != "directory" && match ".*\\.yaml" name != null) (attrNames entries);

  # A text as its documents, each a list of lines; those without content are dropped.
  documents =
    text:
    let
      step =
        state: line:
        if match "---[[:space:]]*(#.*)?" line == null then
          state // { current = state.current ++ [ line ]; }
        else
          {
            done = state.done ++ [ state.current ];
            current = [ ];
          };
      end = builtins.foldl' step {
        done = [ ];
        current = [ ];
      } (lines text);
    in
    filter (document: filter (line: match "[[:space:]]*(#.*)?" line == null) document != [ ]) (
      end.done ++ [ end.current ]
    );

  all = concatMap (name: documents (readFile (directory + "/${name}"))) names;

  # `kubectl apply` creates in this order, and a ServiceAccount needs its Namespace to exist.
  rank =
    document:
    let
      kinds = filter (kind: kind != null) (map (match "kind:[[:space:]]*([A-Za-z]+).*") document);
      kind = if kinds == [ ] then "" else head (head kinds);
    in
    {
      Namespace = 0;
      CustomResourceDefinition = 1;
    }
    .${kind} or 2;

  ordered = concatMap (wanted: filter (document: rank document == wanted) all) [
    0
    1
    2
  ];

  # `image: <anything of ours>`; images of others, such as sidecars, stay.
  image = match "([[:space:]]*(- )?image:[[:space:]]*)[\"']?[^\"' ]*cknix[^\"' ]*[\"']?([[:space:]]*(#.*)?)";
  withImage =
    line:
    let
      found = image line;
    in
    if imageRef == null || found == null then line else "${elemAt found 0}${imageRef}${elemAt found 2}";

  checked =
    if imageRef == null || filter (line: image line != null) (builtins.concatLists all) != [ ] then
      ordered
    else
      throw "imageRef is set, but no file of ${toString directory} has an `image:` with cknix in its name to replace";

  # The newline at the end of a file is an empty last line here.
  trimmed =
    document:
    let
      last = length document - 1;
    in
    if elemAt document last == "" then trimmed (genList (elemAt document) last) else document;

  text = concatStringsSep "\n---\n" (
    map (document: concatStringsSep "\n" (map withImage (trimmed document))) checked
  ) + "\n";
in
derivation {
  name = "cknix.yaml";
  system = "builtin";
  builder = "builtin:fetchurl";
  preferLocalBuild = true;
  url = "file://${builtins.toFile "cknix.yaml" text}";
  executable = false;
  unpack = false;
  outputHashMode = "flat";
  outputHashAlgo = "sha256";
  outputHash = hashString "sha256" text;
}
