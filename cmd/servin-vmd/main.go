// Command servin-vmd owns one user's virtual machine: the host's side of VM mode.
// `servin` starts it when a command needs the machine; it leaves when the machine has
// been off for a while.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"github.com/gofrs/flock"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/release"
	"github.com/cloudos-io/cloudos/internal/vm"
	"github.com/cloudos-io/cloudos/internal/vm/host"
)

var version = "dev"

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "servin-vmd:", err)
		os.Exit(1)
	}
}

func run() error {
	home, err := os.UserHomeDir()
	if err != nil && os.Getenv("SERVIN_VM_ROOT") == "" {
		return fmt.Errorf("cannot find the home folder: %w", err)
	}
	place := api.FindVMPlace(os.Getenv, home)
	program, err := os.Executable()
	if err != nil {
		return err
	}
	if p, err := filepath.EvalSymlinks(program); err == nil {
		program = p
	}
	image := flag.String("image", vm.FindImage(os.Getenv, program), "folder of the CloudOS image")
	keys := flag.String("image-keys", filepath.Join(place.State, "image-keys"), "folder of public keys (*.pub); where it has some, one of them has to have signed the image")
	leave := flag.Duration("leave", 15*time.Minute, "leave after the machine was off for so long; 0 is never")
	show := flag.Bool("version", false, "print the version and leave")
	flag.Parse()
	if *show {
		fmt.Println("servin-vmd version", version)
		return nil
	}
	if flag.NArg() > 0 {
		return errors.New("takes no arguments: the machine is configured with 'servin vm config'")
	}
	trusted, err := release.KeysIn(*keys)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(place.State, 0o700); err != nil {
		return err
	}
	lock := flock.New(filepath.Join(place.State, "vmd.lock"))
	if ok, err := lock.TryLock(); err != nil {
		return fmt.Errorf("cannot lock %s: %w", lock.Path(), err)
	} else if !ok {
		return errors.New("another servin-vmd owns this user's machine")
	}
	defer lock.Unlock()
	logFile := filepath.Join(place.State, "vmd.log")
	if fi, err := os.Stat(logFile); err == nil && fi.Size() > 1<<20 {
		os.Rename(logFile, logFile+".1")
	}
	f, err := os.OpenFile(logFile, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	h, err := host.New(host.Config{
		Place: place, Drivers: drivers(ownState(home)), Computer: computer(home), Image: *image, ImageKeys: trusted,
		Log: slog.New(slog.NewJSONHandler(f, nil)), LogFile: logFile, Leave: *leave,
	})
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	signal.Ignore(syscall.SIGHUP)
	return h.Run(ctx)
}

// ownState is the state folder that the user has where no variable names another.
func ownState(home string) string {
	return api.FindVMPlace(func(name string) string {
		if name == "SERVIN_VM_ROOT" {
			return ""
		}
		return os.Getenv(name)
	}, home).State
}

// computer is what the machine's defaults depend on.
func computer(home string) vm.Computer {
	return vm.Computer{CPUs: runtime.NumCPU(), MemoryMiB: int(memory() >> 20), Home: home}
}
