// Command cloudos-init is the first process of the operating system.
package main

import "github.com/cloudos-io/cloudos/internal/osinit"

// version is the release, set at link time.
var version = "dev"

func main() { osinit.Main(version) }
