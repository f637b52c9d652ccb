package main

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/pflag"

	"github.com/cloudos-io/cloudos/internal/osimage"
	"github.com/cloudos-io/cloudos/internal/release"
)

// signing are the flags about keys of a build.
type signing struct {
	sign, trust []string
}

func (s *signing) flags(f *pflag.FlagSet) {
	f.StringArrayVar(&s.sign, "sign", nil, "file of a private key to sign with (may be repeated); the image trusts its public half")
	f.StringArrayVar(&s.trust, "trust", nil, "file of a public key that the image trusts besides (may be repeated)")
}

func (s *signing) read() ([]ed25519.PrivateKey, []release.Key, error) {
	var private []ed25519.PrivateKey
	for _, file := range s.sign {
		k, err := release.ReadPrivate(file)
		if err != nil {
			return nil, nil, err
		}
		private = append(private, k)
	}
	public, err := release.ReadPublic(s.trust...)
	return private, public, err
}

// signingKey makes the keys that images and releases are signed with.
func signingKey(file string) error {
	k, err := release.Generate(file)
	if err != nil {
		return err
	}
	fmt.Printf("private key  %s\npublic key   %s\nid           %s\n", file, k.Name, k.ID())
	return nil
}

func verify(args []string) error {
	f := pflag.NewFlagSet("verify", pflag.ContinueOnError)
	f.SetOutput(io.Discard)
	keys := f.StringArray("key", nil, "file of a public key to trust (may be repeated)")
	if err := f.Parse(args); err != nil {
		if errors.Is(err, pflag.ErrHelp) {
			fmt.Print(usage, f.FlagUsages())
			return nil
		}
		return err
	}
	if f.NArg() != 1 || len(*keys) == 0 {
		return errors.New("verify takes --key FILE and an image's folder, or a release")
	}
	trusted, err := release.ReadPublic(*keys...)
	if err != nil {
		return err
	}
	signer, err := osimage.Verify(f.Arg(0), trusted)
	if err != nil {
		return err
	}
	fmt.Printf("%s is what was signed by %s\n", f.Arg(0), signer)
	return nil
}
