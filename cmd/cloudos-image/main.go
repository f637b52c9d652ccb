// Command cloudos-image builds images of the operating system and tells what is
// in them. The program cloudos runs it as "cloudos image".
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"

	"github.com/spf13/pflag"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/osimage"
)

const usage = `Usage:
  cloudos image build [--arch amd64|arm64] [--format vm|wsl|disk|iso|netboot|release] [--sign KEY] -o DIR
  cloudos image inspect [-n FILES | --json] DIR
  cloudos image keygen --secure-boot [--name NAME] -o DIR
  cloudos image enroll --secure-boot-cert CERT --vars FILE -o FILE
  cloudos image keygen FILE
  cloudos image verify --key FILE.pub DIR|RELEASE

`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		if ctx.Err() != nil {
			fmt.Fprintln(os.Stderr, "cloudos image: interrupted: no image was finished; what was downloaded and packed is kept for the next time")
			os.Exit(130)
		}
		fmt.Fprintln(os.Stderr, "cloudos image:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) == 0 || args[0] == "help" || args[0] == "--help" || args[0] == "-h" {
		fmt.Print(usage)
		return nil
	}
	switch args[0] {
	case "build":
		return build(ctx, args[1:])
	case "inspect":
		return inspect(args[1:])
	case "keygen":
		return keygen(args[1:])
	case "enroll":
		return enroll(args[1:])
	case "verify":
		return verify(args[1:])
	default:
		return fmt.Errorf("there is no command %q\n\n%s", args[0], usage)
	}
}

func build(ctx context.Context, args []string) error {
	f := pflag.NewFlagSet("build", pflag.ContinueOnError)
	f.SortFlags = false
	f.SetOutput(io.Discard)
	var o osimage.Options
	f.StringVar(&o.Arch, "arch", runtime.GOARCH, "amd64 or arm64")
	f.StringVar(&o.Format, "format", "vm", "vm: kernel, initrd and root for VM mode; wsl: a distribution for VM mode under WSL2; disk: for clouds; iso: for discs and sticks; netboot: kernel and initrd; release: what systems are upgraded from")
	f.StringVar(&o.DiskFormat, "disk-format", "raw", "raw or qcow2, of the format disk")
	f.StringVar(&o.Words, "append", "", "words to add to the kernel's command line, of disk, iso and release")
	configFile := f.String("config", "", "file with the machine's configuration for the image to carry: used where no other place has one")
	f.StringVarP(&o.Output, "output", "o", "", "folder that the image is written to")
	version := f.String("version", "", "the system's version (default: that of the programs)")
	f.StringVar(&o.Programs, "programs", "", "folder with the programs for the architecture (default: where this program is)")
	f.StringVar(&o.KernelPackage, "kernel", "", "file of a kernel's Debian package (default: the newest one, through apt)")
	f.StringVar(&o.Cache, "cache", "", "folder where packages are kept (default: the user's cache folder)")
	key := f.String("secure-boot-key", "", "sign a disk or a release for Secure Boot with this key (PEM); see keygen")
	cert := f.String("secure-boot-cert", "", "the key's certificate (PEM)")
	f.StringVar(&o.Platform, "platform", "metal", "of the format release: metal has the drivers of real machines and of clouds, cloud the latter alone")
	var keys signing
	keys.flags(f)
	quiet := f.BoolP("quiet", "q", false, "say nothing but errors")
	if err := f.Parse(args); err != nil {
		if errors.Is(err, pflag.ErrHelp) {
			fmt.Print(usage, f.FlagUsages())
			return nil
		}
		return err
	}
	if f.NArg() > 0 || o.Output == "" {
		return errors.New("build takes -o DIR and no arguments")
	}
	var err error
	if *configFile != "" {
		if o.Config, err = os.ReadFile(*configFile); err != nil {
			return fmt.Errorf("cannot read the configuration: %w", err)
		}
		if len(o.Config) == 0 {
			return fmt.Errorf("cannot put the configuration into the image: %s is empty", *configFile)
		}
	}
	if (*key == "") != (*cert == "") {
		return errors.New("--secure-boot-key and --secure-boot-cert go together")
	}
	if *key != "" {
		var err error
		if o.Owner, err = osimage.LoadOwner(*key, *cert); err != nil {
			return err
		}
	}
	if o.Programs == "" {
		exe, err := os.Executable()
		if err != nil {
			return err
		}
		o.Programs = filepath.Dir(exe)
	}
	if o.Cache == "" {
		base, err := os.UserCacheDir()
		if err != nil {
			return fmt.Errorf("%w: name a folder with --cache", err)
		}
		o.Cache = filepath.Join(base, "cloudos", "packages")
	}
	if o.Sign, o.Trust, err = keys.read(); err != nil {
		return err
	}
	o.Version = api.Version
	if *version != "" {
		o.Version = *version
	}
	o.Log = func(format string, args ...any) {
		if !*quiet {
			fmt.Fprintf(os.Stderr, format+"\n", args...)
		}
	}
	img, err := osimage.Build(ctx, o)
	if err != nil {
		return err
	}
	if !*quiet {
		for _, role := range []string{"kernel", "initrd", "root", "disk", "iso", "release"} {
			if file, ok := img.Files[role]; ok {
				fmt.Printf("%-8s %9.1f MB  %s\n", role, float64(file.Size)/1e6, filepath.Join(o.Output, file.Name))
			}
		}
	}
	return nil
}

func inspect(args []string) error {
	f := pflag.NewFlagSet("inspect", pflag.ContinueOnError)
	f.SetOutput(io.Discard)
	n := f.IntP("files", "n", 15, "how many of the biggest files to show")
	asJSON := f.Bool("json", false, "print the description and all files with their sizes in bytes as JSON")
	if err := f.Parse(args); err != nil {
		if errors.Is(err, pflag.ErrHelp) {
			fmt.Print(usage, f.FlagUsages())
			return nil
		}
		return err
	}
	if f.NArg() != 1 || *n < 0 {
		return errors.New("inspect takes the folder of one image")
	}
	in, err := osimage.Inspect(f.Arg(0))
	if err != nil {
		return err
	}
	if *asJSON {
		e := json.NewEncoder(os.Stdout)
		e.SetIndent("", "  ")
		return e.Encode(in)
	}
	in.Print(os.Stdout, *n)
	return nil
}
