package main

import (
	"errors"
	"fmt"
	"io"
	"path/filepath"

	"github.com/spf13/pflag"

	"github.com/cloudos-io/cloudos/internal/osimage"
)

// keygen makes the keys of an owner for Secure Boot.
func keygen(args []string) error {
	f := pflag.NewFlagSet("keygen", pflag.ContinueOnError)
	f.SetOutput(io.Discard)
	secure := f.Bool("secure-boot", false, "keys with which firmware checks what it starts")
	name := f.String("name", "CloudOS owner", "the certificate's name")
	out := f.StringP("output", "o", "", "folder that the keys are written to")
	if err := f.Parse(args); err != nil {
		if errors.Is(err, pflag.ErrHelp) {
			fmt.Print(usage, f.FlagUsages())
			return nil
		}
		return err
	}
	if f.NArg() == 1 && *out == "" && !*secure {
		return signingKey(f.Arg(0))
	}
	if f.NArg() > 0 || *out == "" || !*secure {
		return errors.New("keygen takes the file for a key to sign images with, or --secure-boot and -o DIR")
	}
	if err := osimage.NewOwner(*out, *name); err != nil {
		return err
	}
	fmt.Printf("%s is secret: who has it can sign systems for your machines. Enroll %s.\n", filepath.Join(*out, osimage.OwnerKey), filepath.Join(*out, osimage.OwnerCert))
	return nil
}

// enroll puts an owner's certificate into a virtual machine's firmware.
func enroll(args []string) error {
	f := pflag.NewFlagSet("enroll", pflag.ContinueOnError)
	f.SetOutput(io.Discard)
	cert := f.String("secure-boot-cert", "", "the owner's certificate (PEM)")
	vars := f.String("vars", "/usr/share/OVMF/OVMF_VARS_4M.fd", "OVMF's variables without keys")
	out := f.StringP("output", "o", "", "file with the variables to start the machine with")
	if err := f.Parse(args); err != nil {
		if errors.Is(err, pflag.ErrHelp) {
			fmt.Print(usage, f.FlagUsages())
			return nil
		}
		return err
	}
	if f.NArg() > 0 || *out == "" || *cert == "" {
		return errors.New("enroll takes --secure-boot-cert CERT, -o FILE and no arguments")
	}
	c, err := osimage.LoadCertificate(*cert)
	if err != nil {
		return err
	}
	return osimage.EnrollOVMF(*vars, *out, c)
}
